"""`refgemma inspect --doctor`: each ailment of a folder is found, with what to do; a healthy one is healthy."""

import json
import shutil

import numpy as np
import pytest

from refgemma.checkpoint.contents import Contents, numbers_of
from refgemma.checkpoint.doctor import about_norms, examine, published_size, sizes_of
from refgemma.checkpoint.folder import find_model, read_folder
from refgemma.checkpoint.names import SHAPES
from refgemma.cli import main
from refgemma.config import SIZES
from refgemma.files.safetensors import StoredTensor
from refgemma.numerics import from_bfloat16
from tests.checkpoint.files import safetensors_bytes, write_model, write_shards
from tests.models import hf_config, hf_tensors, random_model

LAYER = "model.layers.1."


def copies(tensors):
    return {name: array.copy() for name, array in tensors.items()}


@pytest.fixture(scope="module")
def model(small_tokenizer):
    return random_model(2, num_layers=2, vocab_size=small_tokenizer.vocab_size)


@pytest.fixture
def patient(model, small_tokenizer, tmp_path):
    """``patient(change, config)``: a folder, its tensors and its config.json changed."""

    def patient(change=dict, config=dict, write=write_model, dtype="F32", tokenizer=True):
        folder = write(tmp_path / "patient", model, dtype, change=lambda t: change(copies(t)))
        (folder / "config.json").write_text(json.dumps(config(hf_config(model.config))))
        if tokenizer:
            shutil.copy(small_tokenizer.path, folder / "tokenizer.model")
        return folder

    return patient


def wrong(folder):
    """What is wrong, as "about: what"; each with something to do."""
    remarks = [remark for remark in examine(folder) if remark.grade == "wrong"]
    assert all(remark.todo for remark in remarks)
    assert all("\n" not in remark.what + remark.todo for remark in remarks)
    return [f"{remark.about}: {remark.what}" for remark in remarks]


def looks(folder):
    return [f"{remark.about}: {remark.what}" for remark in examine(folder) if remark.grade == "look"]


def test_a_healthy_folder(patient):
    for dtype in ("F32", "BF16", "F16"):
        folder = patient(dtype=dtype)
        assert wrong(folder) + looks(folder) == []
        shutil.rmtree(folder)
    assert {remark.grade for remark in examine(find_model("tiny-it"))} == {"fine"}
    about = [remark.about for remark in examine(find_model("tiny-it"))]
    assert about == ["family", "config", "formats", "norms", "head", "vocabulary"]


# ---- norms


def folded(tensors):
    return {name: a + np.float32(1) if name.endswith("norm.weight") else a for name, a in tensors.items()}


def test_norms_that_hold_one_plus_w():
    """The shipped model, folded as a GGUF converter would: its mean is 0.7, and a threshold at 0.9 would not see it."""
    norms = {t.name: t for t in read_folder(find_model("tiny-it")).values() if t.data.ndim == 1}
    raw = {name: numbers_of(t) for name, t in norms.items()}
    assert [r.grade for r in about_norms(raw)] == ["fine"]
    one_more = {
        name: numbers_of(StoredTensor(name, "F32", from_bfloat16(t.data) + np.float32(1), t.file))
        for name, t in norms.items()
    }
    (remark,) = about_norms(one_more)
    assert remark.grade == "wrong"
    assert "they look like 1 + w" in remark.what
    assert remark.todo.startswith("subtract 1 from every norm weight")


def test_folded_norms_of_a_folder(patient):
    quiet = lambda t: {n: a * np.float32(0.3) if a.ndim == 1 else a for n, a in t.items()}  # noqa: E731
    (found,) = wrong(patient(lambda t: folded(quiet(t))))
    assert found.startswith("norms: norm weights from ")
    assert found.endswith("none below zero: they look like 1 + w, as GGUF files store them")
    assert wrong(patient(quiet)) == []


def test_each_kind_of_norm_is_judged_by_itself():
    """A converter that knew the one name and not the other; over all norms together the mean says nothing."""
    norms = {t.name: t for t in read_folder(find_model("tiny-it")).values() if t.data.ndim == 1}

    def remarks(kind):
        return list(
            about_norms(
                {
                    name: numbers_of(
                        StoredTensor(name, "F32", from_bfloat16(t.data) + np.float32(name.endswith(kind)), t.file)
                    )
                    for name, t in norms.items()
                }
            )
        )

    for kind, other in (
        ("input_layernorm", "post_attention_layernorm"),
        ("post_attention_layernorm", "input_layernorm"),
    ):
        found = {remark.grade: remark for remark in remarks(f".{kind}.weight")}
        assert found["wrong"].what.startswith(f"6 norms called {kind}: norm weights from ")
        assert found["wrong"].todo.startswith("subtract 1 from the weights of these")
        grades = [(r.grade, r.what.partition(":")[0]) for r in remarks(f".{kind}.weight") if r.grade != "wrong"]
        assert grades == [("fine", f"6 norms called {other}"), ("fine", "the final norm")]
    # One vector alone is no proof: its 184 numbers may well have been trained to one side.
    (final,) = [remark for remark in remarks("model.norm.weight") if remark.grade != "fine"]
    assert (final.grade, final.what.partition(":")[0]) == ("look", "the final norm")
    assert final.todo == "compare with another copy: if this norm holds 1 + w, subtract 1"


def test_norms_before_training(patient):
    def set_to(value):
        return lambda t: {n: np.full_like(a, value) if a.ndim == 1 else a for n, a in t.items()}

    assert wrong(patient(set_to(0))) == []
    assert "all norm weights are zero, as before training" in looks(patient(set_to(0)))[0]
    assert "all norm weights are one" in wrong(patient(set_to(1)))[0]
    assert "norms" in looks(patient(set_to(0.25)))[0]  # neither: said, not judged


# ---- numbers


@pytest.mark.parametrize(
    ("value", "words"),
    [(np.nan, "NaN"), (np.inf, "infinite numbers"), (-np.inf, "infinite numbers"), (2e4, "numbers beyond 10,000")],
)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_damage(patient, value, words, dtype):
    def change(tensors):
        array = tensors[LAYER + "mlp.up_proj.weight"]
        narrow = np.float32(value).view(np.uint32) >> np.uint32(16) if dtype == "BF16" else value
        array[3, 4] = narrow
        return tensors

    assert wrong(patient(change, dtype=dtype)) == [f"numbers: {LAYER}mlp.up_proj.weight: {words}"]


def test_a_matrix_of_zeros(patient):
    def change(tensors):
        for i in (0, 1):
            tensors[f"model.layers.{i}.self_attn.v_proj.weight"][:] = 0
        return tensors

    assert wrong(patient(change)) == ["numbers: model.layers.0.self_attn.v_proj.weight and 1 more: nothing but zeros"]


def test_formats(patient):
    mixed = patient(lambda t: {n: a.astype(np.float16) if a.ndim == 1 else a for n, a in t.items()})
    assert wrong(mixed) == []
    assert looks(mixed) == ["formats: 15 tensors in F32 and 5 tensors in F16"]
    quantised = patient(lambda t: {n: a.astype(np.uint8) if "up_proj" in n else a for n, a in t.items()})
    assert wrong(quantised) == ["formats: 2 tensors are stored as U8, model.layers.0.mlp.up_proj.weight first"]


# ---- names, shapes, configuration


@pytest.mark.parametrize("prefix", ["language_model.", "base_model.model.", "_orig_mod.", "module."])
def test_names_with_something_before_them(patient, prefix):
    found = wrong(patient(lambda t: {prefix + n: a for n, a in t.items()}))
    assert found == [f"names: names begin with {prefix}model."]
    newer = patient(lambda t: {"model.language_model." + n.removeprefix("model."): a for n, a in t.items()})
    assert wrong(newer) == ["names: names begin with model.language_model."]


def test_families(patient):
    def with_norms(*names):
        def change(t):
            norm = t["model.layers.0.input_layernorm.weight"]
            return t | {f"model.layers.{i}.{name}.weight": norm for name in names for i in (0, 1)}

        return change

    four = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    assert wrong(patient(with_norms(*four)))[0].startswith(
        "family: Gemma 2 by the norms of its layers, of no published"
    )
    assert wrong(patient(with_norms(*four, "self_attn.q_norm")))[0].startswith("family: Gemma 3 by the norms")
    other = wrong(patient(with_norms("self_attn.q_norm")))
    assert other[0] == "family: the names of the tensors match no Gemma 1, 2 or 3"
    biased = patient(lambda t: t | {LAYER + "self_attn.q_proj.bias": t[LAYER + "input_layernorm.weight"]})
    assert "match no Gemma 1, 2 or 3" in wrong(biased)[0]


@pytest.mark.parametrize("name", SHAPES)
def test_published_sizes_are_known_by_their_shapes(name):
    shape = SHAPES[name]
    if name in SIZES:
        c = SIZES[name]
        sizes = (
            c.vocab_size,
            c.hidden_size,
            c.layers[0].intermediate_size,
            c.num_layers,
            c.layers[0].num_heads,
            c.layers[0].num_kv_heads,
            c.layers[0].head_dim,
        )
        assert sizes == tuple(shape[letter] for letter in "VDFLNKH")
    patient = Contents(folder=None)
    for tensor, size in [
        ("model.embed_tokens.weight", (shape["V"], shape["D"])),
        ("model.layers.0.mlp.gate_proj.weight", (shape["F"], shape["D"])),
        ("model.layers.0.self_attn.q_proj.weight", (shape["N"] * shape["H"], shape["D"])),
        ("model.layers.0.self_attn.k_proj.weight", (shape["K"] * shape["H"], shape["D"])),
        (f"model.layers.{shape['L'] - 1}.input_layernorm.weight", (shape["D"],)),
    ]:
        patient.tensors[tensor] = np.broadcast_to(np.float32(0), size)
    assert published_size(sizes_of(patient)) == name


def test_missing_and_unknown_tensors(patient):
    def change(tensors):
        tensors["model.layers.0.self_attn.q_prj.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
        return tensors

    found = wrong(patient(change))
    assert "names: model.layers.0.self_attn.q_proj.weight is missing" in found
    assert "names: model.layers.0.self_attn.q_prj.weight is not known in Gemma 1" in found
    short = wrong(patient(lambda t: {n: a for n, a in t.items() if not n.startswith(LAYER)}))
    assert short == ["config: num_hidden_layers is 2, the tensors have 1"]


def test_a_layer_of_another_shape(patient, model):
    def change(tensors):
        tensors[LAYER + "mlp.down_proj.weight"] = tensors[LAYER + "mlp.down_proj.weight"].T.copy()
        return tensors

    D, F = model.config.hidden_size, model.config.layers[0].intermediate_size
    expected = f"shapes: {LAYER}mlp.down_proj.weight has shape {(F, D)}, expected {(D, F)}"
    assert wrong(patient(change)) == [expected]


def test_the_configuration_against_the_shapes(patient, model):
    c = model.config
    for field, size in (("hidden_size", c.hidden_size), ("intermediate_size", c.layers[0].intermediate_size)):
        found = wrong(patient(config=lambda f, field=field: {**f, field: f[field] + 2}))
        assert found[0] == f"config: {field} is {size + 2}, the tensors have {size}"
    rows = c.layers[0].num_heads * c.layers[0].head_dim
    derived = patient(config=lambda f: {**f, "head_dim": f["hidden_size"] // f["num_attention_heads"]})
    assert wrong(derived)[0].startswith(f"config: num_attention_heads {c.layers[0].num_heads} x head_dim ")
    assert any(f"set head_dim to {c.layers[0].head_dim} in config.json" in remark.todo for remark in examine(derived))
    without = patient(config=lambda f: {k: v for k, v in f.items() if k != "head_dim"})
    assert f"num_attention_heads {c.layers[0].num_heads} x head_dim None is not {rows}" in wrong(without)[0]
    text = wrong(patient(config=lambda f: {**f, "hidden_size": str(c.hidden_size)}))
    assert text == [f"config: hidden_size is '{c.hidden_size}', the tensors have {c.hidden_size}"]
    text = wrong(patient(config=lambda f: {**f, "head_dim": str(c.layers[0].head_dim)}))
    assert text[0].startswith(
        f"config: num_attention_heads {c.layers[0].num_heads} x head_dim '{c.layers[0].head_dim}' is not "
    )
    assert wrong(patient(config=lambda f: {**f, "model_type": "llama"})) == ["config: model_type is 'llama'"]
    assert wrong(patient(config=lambda f: {**f, "hidden_act": "silu"})) == ["config: hidden_act is 'silu'"]
    eps = patient(config=lambda f: {**f, "rms_norm_eps": 1e-5})
    assert (wrong(eps), len(looks(eps))) == ([], 1)


# ---- head and vocabulary


def test_the_head(patient):
    untied = patient(config=lambda f: {**f, "tie_word_embeddings": False})
    assert wrong(untied) == ["head: tie_word_embeddings is false, and there is no lm_head.weight"]
    twice = patient(lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
    assert (wrong(twice), looks(twice)) == ([], ["head: lm_head.weight is the embedding, stored twice"])
    other = lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * np.float32(2)}  # noqa: E731
    assert wrong(patient(other)) == ["head: lm_head.weight differs from the embedding, yet tie_word_embeddings is true"]
    own = patient(other, config=lambda f: {**f, "tie_word_embeddings": False})
    assert (wrong(own), looks(own)) == ([], ["head: untied: a head of its own"])


def test_vocabulary(patient, model):
    V = model.config.vocab_size

    def padded(tensors):
        table = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = np.concatenate([table, table[:2], np.zeros_like(table[:6])])
        return tensors

    more = patient(padded, config=lambda f: {**f, "vocab_size": V + 8})
    assert (wrong(more), looks(more)) == ([], [f"vocabulary: 8 rows beyond the {V} pieces, 6 of them zero"])

    def cut(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-8]
        return tensors

    fewer = patient(cut, config=lambda f: {**f, "vocab_size": V - 8})
    assert wrong(fewer) == [f"vocabulary: the table has {V - 8} rows, the tokenizer {V} pieces"]


# ---- folders that cannot be loaded at all


def test_files(patient, model, tmp_path):
    assert wrong(patient(tokenizer=False)) == ["tokenizer: there is no tokenizer.model"]
    shutil.rmtree(tmp_path / "patient")

    folder = patient(write=write_shards)
    assert wrong(folder) == []
    (folder / "model-00002-of-00003.safetensors").unlink()
    found = wrong(folder)
    assert any("lacks model-00002-of-00003.safetensors" in line for line in found)
    assert any("tensors of the index are in no file that can be read" in line for line in found)
    assert any(line.startswith("names: ") and "missing" in line for line in found)
    shutil.rmtree(folder)

    folder = patient()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert [line.partition(":")[0] for line in wrong(folder)] == ["files"]
    assert "is cut off" in wrong(folder)[0]

    (folder / "config.json").write_text("{")
    assert any(line.startswith("config: config.json is not valid JSON") for line in wrong(folder))
    (folder / "config.json").unlink()
    assert "config: there is no config.json" in wrong(folder)
    weights.unlink()
    (folder / "pytorch_model.bin").touch()
    assert any("pickled and never opened" in remark.what + remark.todo for remark in examine(folder))

    weights.write_bytes(safetensors_bytes(hf_tensors(model.params)))
    assert wrong(folder) == ["config: there is no config.json"]


def test_the_command(patient, capsys, model):
    folder = patient()
    assert main(["inspect", "--doctor", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: all is well"
    assert [line.split()[0] for line in lines[1:]] == ["fine"] * 6
    patient(lambda t: {n: np.full_like(a, np.nan) if n.endswith("norm.weight") else a for n, a in t.items()})
    assert main(["inspect", "--doctor", str(folder), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["wrong"] == 1
    assert shown["remarks"][0]["what"] == "model.layers.0.input_layernorm.weight and 4 more: NaN"
    assert main(["inspect", "--doctor", str(folder / "absent")]) == 2
    assert main(["inspect", "--doctor", "tiny-it"]) == 0  # a name, as everywhere
