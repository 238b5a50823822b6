"""`refgemma diagnose`: the library's diagnosis, as text and JSON; exit code 1 when something is wrong."""

import json

import numpy as np
import pytest

from refgemma import oracle
from refgemma.cli import main
from refgemma.oracle.bugs import port
from refgemma.oracle.bugs.catalogue import find as bug_of
from refgemma.oracle.bugs.catalogue import with_bugs
from refgemma.oracle.formula_models.formula import find
from tests.oracle.publish import trace_of


@pytest.fixture
def dumps(tmp_path):
    """Logits of reveal-gqa, right and by SiLU, and a trace under other names."""
    model = find("reveal-gqa")
    trace, honest = trace_of(model)
    (wrong,) = with_bugs(honest, [bug_of("C2")])
    np.save(tmp_path / "right.npy", trace.tensors["logits"].astype(np.float32))
    np.save(tmp_path / "silu.npy", port.run(wrong).astype(np.float32))
    act = trace.tensors["layers.0.mlp.gate"]
    silu = {"blk.0.gate": act.astype(np.float32), "blk.0.act": (act / (1 + np.exp(-act))).astype(np.float32)}
    np.savez(tmp_path / "named.npz", **silu)
    (tmp_path / "names.json").write_text('{"blk.{i}.gate": "layers.{i}.mlp.gate", "blk.{i}.act": "layers.{i}.mlp.act"}')
    return tmp_path


def diagnosed(capsys, *arguments):
    code = main(["diagnose", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_text(dumps, capsys):
    code, out, err = diagnosed(capsys, dumps / "silu.npy", "--model", "reveal-gqa")
    assert (code, err) == (1, "")
    assert out.rstrip("\n") == oracle.diagnose(dumps / "silu.npy", "reveal-gqa").text()
    assert out.startswith("SiLU (C2)\n")
    assert "https://github.com/NVIDIA/TensorRT-Model-Connect/pull/177" in out
    code, out, err = diagnosed(capsys, dumps / "right.npy", "--model", "reveal-gqa")
    assert (code, err) == (0, "")
    assert out.startswith("no known bug needed")


def test_json(dumps, capsys):
    code, out, err = diagnosed(capsys, dumps / "silu.npy", "--model", "reveal-gqa", "--json", "--no-pairs")
    assert (code, err) == (1, "")
    shown = json.loads(out)
    assert shown["first"]["variants"][0]["key"] == "C2"
    assert (shown["ok"], shown["needed"], shown["tied"], shown["basis"]) == (False, True, [], "logits")
    assert shown["honest"]["left"] == ["logits"]


def test_a_mapping_and_an_arithmetic(dumps, capsys):
    options = ("--model", "reveal-gqa", "--map", dumps / "names.json", "--arithmetic", "float32")
    code, out, err = diagnosed(capsys, dumps / "named.npz", *options)
    assert (code, err) == (1, "")
    assert out.startswith("SiLU (C2)\n")


def test_tokens_that_the_file_does_not_hold(dumps, capsys):
    rows = np.load(dumps / "silu.npy")[:1]
    np.save(dumps / "one.npy", rows)
    tokens = ",".join(map(str, find("reveal-gqa").tokens[0]))
    code, out, err = diagnosed(capsys, dumps / "one.npy", "--model", "reveal-gqa", "--tokens", tokens)
    assert (code, err) == (1, "")
    assert out.startswith("SiLU (C2)\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.npy"], "nowhere.npy"),
        (["{dumps}/right.npy", "--model", "nothing"], "nothing"),
        (["{dumps}/right.npy", "--model", "reveal-gqa", "--arithmetic", "float31"], "unknown arithmetic 'float31'"),
        (["{dumps}/named.npz", "--model", "reveal-gqa"], "holds no tensor that is recognised"),
        (["{dumps}/right.npy", "--model", "reveal-gqa", "--map", "{dumps}/right.npy"], "UTF-8"),
    ],
)
def test_bad_use_is_one_sentence(dumps, capsys, arguments, words):
    code, out, err = diagnosed(capsys, *(argument.format(dumps=dumps) for argument in arguments))
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
