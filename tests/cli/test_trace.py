"""`refgemma trace`: the library's trace in a file, and what it says of it."""

import json

import numpy as np
import pytest

from refgemma import oracle
from refgemma.oracle.operations import names_of


def test_a_prompt_and_the_same_tokens(run, gemma, folder, tmp_path):
    path, again = tmp_path / "trace.safetensors", tmp_path / "again.safetensors"
    code, out, err = run("trace", "hello world", "--output", str(path))
    assert (code, err) == (0, "")
    trace = oracle.read_trace(path)
    tokens = gemma.encode_prompt("hello world")
    assert trace.tokens.tolist() == [tokens]
    assert list(trace.tensors) == names_of(gemma.config)
    assert trace.meta["model"] == str(folder)
    want = oracle.trace(gemma, tokens)
    assert all(np.array_equal(value, want.tensors[name]) for name, value in trace.tensors.items())
    lines = out.splitlines()
    assert lines[0].startswith(f"{path}: {len(want.tensors)} tensors of {len(tokens)} tokens, ")
    assert ["layers.*.attn.q", "3", *" x ".join(map(str, want.tensors["layers.0.attn.q"].shape)).split()] in [
        line.split() for line in lines
    ]
    code, *_ = run("trace", "--tokens", ",".join(map(str, tokens)), "--output", str(again))
    assert code == 0
    assert again.read_bytes() == path.read_bytes()


def test_some_tensors_of_the_last_position_for_programs(run, gemma, tmp_path):
    path = str(tmp_path / "trace.safetensors")
    options = ["--names", "logits", "--names", "layers.1.*", "--last", "--json", "--numerics", "bf16-transformers"]
    code, out, err = run("trace", "--raw", "hello", "--output", path, *options)
    assert (code, err) == (0, "")
    shown, trace = json.loads(out), oracle.read_trace(path)
    assert shown["tokens"] == trace.tokens[0].tolist() == gemma.encode_prompt("hello", raw=True)
    assert shown["file"] == path
    assert len(shown["tensors"]) == 19
    assert shown["tensors"]["logits"] == {"shape": [1, 1, gemma.config.vocab_size], "dtype": "float32"}
    assert trace.last
    assert trace.meta["numerics"] == "bf16-transformers"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hello"], "the following arguments are required: --output"),
        (["hello", "--output", "trace.npz"], "trace.npz does not end in .safetensors: that is the format of a trace"),
        (["hello", "--output", "absent/trace.safetensors"], "cannot write absent/trace.safetensors: no such folder"),
        (["hello", "--tokens", "1", "--output", "trace.safetensors"], "--tokens was given with a prompt"),
        (["--output", "trace.safetensors"], "no prompt was given"),
        (
            ["hello", "--output", "trace.safetensors", "--names", "logit"],
            "'logit' matches no tensor: the nearest name is",
        ),
        (["--tokens", "1,99999", "--output", "trace.safetensors"], "token id 99999 is outside the vocabulary"),
        (["hello " * 100, "--output", "trace.safetensors"], "the model reads at most 96"),
    ],
)
def test_bad_use(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("trace", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
