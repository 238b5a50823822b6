"""`refgemma compare`: the library's report, as text, JSON and a picture; exit code 1 when something is wrong."""

import json

import numpy as np
import pytest

from refgemma import oracle
from refgemma.cli import main

TOKENS = [2, 40, 41, 42, 43]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, gemma, folder):
    path = tmp_path_factory.mktemp("traces") / "reference.safetensors"
    oracle.trace(gemma, TOKENS, to=path, model=str(folder))
    return path


@pytest.fixture(scope="module")
def candidates(reference):
    """The same numbers under names of transformers, and a copy with one of them wrong."""
    tensors = oracle.read_trace(reference).tensors
    dump = {
        "model.layers.1.self_attn.q_proj": tensors["layers.1.attn.q"].reshape(1, len(TOKENS), -1),
        "lm_head": tensors["logits"],
        "model.layers.1.input": tensors["layers.0.out"],
        "input_ids": np.array([TOKENS]),
    }
    np.savez(reference.with_name("right.npz"), **dump)
    dump["model.layers.1.self_attn.q_proj"] = dump["model.layers.1.self_attn.q_proj"] * np.float32(1.01)
    np.savez(reference.with_name("wrong.npz"), **dump)
    return {name: reference.with_name(f"{name}.npz") for name in ("right", "wrong")}


def compared(capsys, *arguments):
    code = main(["compare", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_text(reference, candidates, capsys):
    code, out, err = compared(capsys, reference, candidates["right"])
    assert (code, err) == (0, "")
    assert out.rstrip("\n") == oracle.compare(reference, candidates["right"]).text()
    code, out, err = compared(capsys, reference, candidates["wrong"])
    assert (code, err) == (1, "")
    assert "WRONG at layers.1.attn.q, the first of " in out
    assert "heads split: B T (N H) read as B T N H" in out


def test_json(reference, candidates, capsys):
    code, out, err = compared(capsys, reference, candidates["wrong"], "--json")
    assert (code, err) == (1, "")
    shown = json.loads(out)
    assert shown["first_divergence"]["name"] == "layers.1.attn.q"
    assert shown["ok"] is False
    missing = next(one for one in shown["findings"] if one["grade"] == "not given")
    assert missing["ratio"] is None


def test_a_model_in_place_of_the_reference(folder, candidates, capsys):
    assert compared(capsys, candidates["right"], "--model", folder)[0] == 0
    assert compared(capsys, "--model", folder, candidates["wrong"])[0] == 1
    assert (
        "5 tokens, as bfloat16\n"
        in compared(capsys, "--model", folder, candidates["right"], "--arithmetic", "bfloat16")[1]
    )


def test_tokens_that_no_file_says(reference, folder, capsys, tmp_path):
    np.save(tmp_path / "logits.npy", oracle.read_trace(reference).tensors["logits"])
    ids = ",".join(map(str, TOKENS))
    assert compared(capsys, "--model", folder, "--tokens", ids, tmp_path / "logits.npy")[0] == 0
    code, _, err = compared(capsys, "--model", folder, tmp_path / "logits.npy")
    assert (code, err.count("\n")) == (2, 1)
    assert "give the tokens that were run" in err


def test_a_mapping(reference, candidates, capsys, tmp_path):
    with np.load(candidates["wrong"]) as arrays:
        np.savez(
            tmp_path / "candidate.npz", query1=arrays["model.layers.1.self_attn.q_proj"], lm_head=arrays["lm_head"]
        )
    (tmp_path / "names.json").write_text(json.dumps({"query{i}": "layers.{i}.attn.q"}))
    code, out, _ = compared(capsys, reference, tmp_path / "candidate.npz", "--map", tmp_path / "names.json")
    assert code == 1
    assert "query1 is layers.1.attn.q; heads split" in out


def test_a_picture(reference, candidates, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install refgemma[plot]")
    assert compared(capsys, reference, candidates["wrong"], "--picture", tmp_path / "report.png")[0] == 1
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = compared(capsys, reference, candidates["right"], "--picture", tmp_path / "report.bmp")
    assert code == 2
    assert "report.bmp ends in '.bmp': expected .png, .svg, .pdf" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: CANDIDATE"),
        (["{right}"], "no model is given: give a reference trace that names it, or the model itself"),
        (["{reference}", "absent.npz"], "absent.npz does not exist or is not a file"),
        (["absent.safetensors", "{right}"], "absent.safetensors does not exist or is not a file"),
        (["{right}", "{reference}"], "right.npz is not a trace written by refgemma: give one first"),
        (["{reference}", "{right}", "--model", "absent"], "absent"),
        (["{reference}", "{right}", "--model", "tiny-it"], "is a trace of another model than"),
        (["{reference}", "{right}", "--arithmetic", "int4"], "unknown arithmetic 'int4'"),
        (
            ["{reference}", "{right}", "--tokens", "2,40"],
            "the reference trace says which tokens were fed: no others can be given",
        ),
        (["{reference}", "{right}", "--tokens", "2,x"], "--tokens"),
        (["{reference}", "{right}", "--map", "absent.json"], "cannot read absent.json"),
        (["{reference}", "{right}", "--map", "{right}"], "is not UTF-8"),
        (["{reference}", "{right}", "--map", "{list}"], "expected an object of names"),
        (["{reference}", "{right}", "--map", "{word}"], "is not valid JSON"),
        (["{reference}", "{right}", "--picture", "{right}"], "--picture and CANDIDATE are the same file"),
    ],
)
def test_bad_use(reference, candidates, capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "word.json").write_text("word")
    places = {"reference": reference, **candidates, "list": tmp_path / "list.json", "word": tmp_path / "word.json"}
    code, out, err = compared(capsys, *(argument.format(**places) for argument in arguments))
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
