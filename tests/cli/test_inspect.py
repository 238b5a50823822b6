"""`refgemma inspect`: what is in the files, and figures that the model itself confirms."""

import json
import math
import shutil

import numpy as np
import pytest

import refgemma
from refgemma.cache import KVCache
from refgemma.checkpoint.load import load_params
from refgemma.cli import main
from refgemma.config import SIZES, read_config, to_json
from tests.checkpoint.files import write_model
from tests.models import map_params, random_model


def inspect(capsys, model, *options):
    code = main(["inspect", "--model", str(model), *options])
    return code, *capsys.readouterr()


def test_json(run, folder, gemma):
    code, out, err = run("inspect", "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["folder"] == str(folder)
    assert shown["config"] == to_json(gemma.config)
    assert shown["num_parameters"] == sum(tensor["count"] for tensor in shown["tensors"])
    by_name = {tensor["ours"]: tensor for tensor in shown["tensors"]}
    for name, array in [
        ("embed", gemma.params["embed"]),
        ("layers.2.attn.out", gemma.params["layers"][2]["attn"]["out"]),
        ("layers.1.mlp.norm", gemma.params["layers"][1]["mlp"]["norm"]),
    ]:
        assert by_name[name]["shape"] == list(array.shape)
        assert by_name[name]["dtype"] == "BF16"
        assert by_name[name]["nbytes"] == 2 * array.size
    assert by_name["layers.1.mlp.norm"]["theirs"] == "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize(
    ("weights", "numerics"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_memory_is_what_the_arrays_take(run, folder, gemma, weights, numerics):
    memory = json.loads(run("inspect", "--json")[1])["memory"]
    params = load_params(folder, gemma.config, weights=weights, norm_dtype=numerics)
    sizes = []
    map_params(lambda array: sizes.append(array.nbytes), params)
    assert memory["weights"][weights] == sum(sizes)
    cache = KVCache(gemma.config, batch=1, capacity=96, dtype=np.dtype(numerics))
    assert memory["cache"][numerics] == {"96": cache.nbytes}  # this model reads no more


def test_layers_that_are_alike_share_a_line(run):
    summary, full = (run("inspect", *options)[1].splitlines() for options in ([], ["--all"]))
    heading = next(n for n, line in enumerate(summary) if line.startswith("layers.{i}.*  model.layers.{i}.*.weight  "))
    assert summary[heading].split()[2:] == ["3", "x"]
    assert summary[heading + 1].split()[:2] == ["attn.norm", "input_layernorm"]
    assert sum("mlp.gate" in line for line in summary) == 1
    assert sum("mlp.gate" in line for line in full) == 3
    assert ["layers.2.mlp.gate", "model.layers.2.mlp.gate_proj.weight"] in [line.split()[:2] for line in full]
    totals = [[line.split() for line in lines if line.startswith(" " * 40)] for lines in (summary, full)]
    assert totals[0] == totals[1]
    assert len(totals[0]) == 1


def test_layers_that_differ_do_not(capsys, tmp_path):
    def change(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        return tensors | {name: tensors[name].astype(np.float16)}

    model = random_model(1, num_layers=3)
    code, out, _ = inspect(capsys, write_model(tmp_path / "mixed", model, change=change))
    assert code == 0
    up = [line.split() for line in out.splitlines() if "mlp.up" in line]
    assert [(words[1:4], words[-4]) for words in up] == [(["(2", "of", "3)"], "F32"), (["(1", "of", "3)"], "F16")]


@pytest.mark.parametrize("name", SIZES)
def test_a_published_size_needs_no_files(capsys, name):
    code, out, err = inspect(capsys, name)
    assert (code, err) == (0, "")
    assert out.startswith(f"{name}: no weights here\n")
    assert f"{SIZES[name].num_parameters:,} parameters" in out
    assert len(out.splitlines()) <= 32  # one screen
    assert max(map(len, out.splitlines())) <= 100


def test_a_folder_with_a_configuration_alone(capsys, folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    code, out, _ = inspect(capsys, tmp_path, "--json")
    shown = json.loads(out)
    assert code == 0
    assert sum(tensor["count"] for tensor in shown["tensors"]) == read_config(tmp_path).num_parameters
    assert {(tensor["dtype"], tensor["nbytes"]) for tensor in shown["tensors"]} == {(None, 0)}


def test_files_that_do_not_fit_are_shown_and_found_wanting(capsys, tmp_path):
    def change(tensors):
        tensors["model.layers.0.self_attn.q_prj.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
        return tensors

    folder = write_model(tmp_path / "wrong", random_model(1), change=change)
    code, out, err = inspect(capsys, folder)
    assert code == 1
    lines = out.splitlines()
    assert next(" missing " in line for line in lines if "self_attn.q_proj" in line)
    assert [line.split()[0] for line in lines if "self_attn.q_prj" in line] == ["?"]
    assert "does not fit its configuration: 2 problems" in err


def test_no_weight_is_read(capsys, tmp_path):
    """NaN in every tensor: the loader reads norm weights and refuses them, the inspector does not look."""
    model = random_model(1)
    nan = map_params(lambda array: np.full_like(array, math.nan), model.params)
    folder = write_model(tmp_path / "nan", type(model)(**{**vars(model), "params": nan}))
    assert inspect(capsys, folder)[0] == 0
    with pytest.raises(ValueError, match="nan"):
        load_params(folder, model.config)


def test_an_unknown_model(capsys):
    code, out, err = inspect(capsys, "gemma-3b")
    assert (code, out) == (2, "")
    assert "no model 'gemma-3b'" in err
    with pytest.raises(FileNotFoundError):
        refgemma.load("gemma-3b")
