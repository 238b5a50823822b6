"""`refgemma logits`: the library's numbers, shown and saved."""

import json

import numpy as np
import pytest
import safetensors.numpy

READERS = {
    "npy": lambda path: {"logits": np.load(path)},
    "npz": lambda path: dict(np.load(path)),
    "safetensors": safetensors.numpy.load_file,
}


def test_the_next_tokens_are_those_of_the_library(run, gemma):
    tokens = gemma.encode_prompt("hello world")
    before, want = gemma.logits(tokens)[-2:].astype(np.float64)
    # The command computes the last position only, whose product with the head may be summed in another order: D terms
    # whose magnitudes add up to less than 100: the normed vector is about sqrt(D) < 15 long, a table row about 3.
    bound = gemma.config.hidden_size * np.finfo(np.float32).eps * 100
    code, out, err = run("logits", "hello world", "--json", "--top", "3")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["tokens"] == tokens
    ids = [entry["id"] for entry in shown["top"]]
    assert ids == list(np.argsort(-want)[:3])
    assert [entry["piece"] for entry in shown["top"]] == [gemma.tokenizer.piece(i) for i in ids]
    logits = np.array([entry["logit"] for entry in shown["top"]])
    assert np.all(np.abs(logits - want[ids]) <= bound)
    assert np.all(np.abs(logits - before[ids]) > bound)  # the position before is another one
    shares = np.array([entry["probability"] for entry in shown["top"]])
    # Numerator and denominator are each off by a factor within exp(bound).
    np.testing.assert_allclose(shares, np.exp(want - np.logaddexp.reduce(want))[ids], rtol=2.1 * bound)


def test_the_table_shows_newlines_as_escapes(run):
    code, out, _ = run("logits", "hello", "--top", "2")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].endswith(r"<start_of_turn> model \n")
    assert lines[3].split() == ["id", "piece", "logit", "probability"]
    assert lines[4].split()[1] == r"\n"  # the random model's favourite is the token it has just read
    assert len(lines) == 6


@pytest.mark.parametrize("ending", READERS)
def test_all_logits_can_be_saved(run, gemma, tmp_path, ending):
    path = tmp_path / f"logits.{ending}"
    assert run("logits", "--tokens", "2, 425,13", "--output", str(path))[0] == 0
    saved = READERS[ending](path)
    assert saved["logits"].dtype == np.float32
    np.testing.assert_array_equal(saved["logits"], gemma.logits([2, 425, 13]))
    if ending != "npy":
        assert saved["tokens"].tolist() == [2, 425, 13]
    assert list(tmp_path.iterdir()) == [path]


def test_float64_is_saved_as_such(run, tmp_path):
    path = tmp_path / "logits.npy"
    assert run("logits", "hello", "--numerics", "float64", "--output", str(path))[0] == 0
    assert np.load(path).dtype == np.float64


def test_control_text_counts_in_a_raw_prompt_only(run, gemma):
    assert gemma.tokenizer.eos_id in json.loads(run("logits", "hello<eos>", "--raw", "--json")[1])["tokens"]
    assert gemma.tokenizer.eos_id not in json.loads(run("logits", "hello<eos>", "--json")[1])["tokens"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hello", "--output", "x.txt"], "expected .npy, .npz, .safetensors"),
        (["hello", "--output", "x"], "expected .npy, .npz, .safetensors"),
        (["hello", "--tokens", "2"], "--tokens was given with a prompt"),
        (["--tokens", "2,x"], "argument --tokens: expected whole numbers, such as 2,106,1645, not '2,x'"),
        (["--tokens", ""], "argument --tokens: expected whole numbers, such as 2,106,1645, not ''"),
        (["--tokens", "2,500"], "token id 500 is outside the vocabulary"),
        (["--tokens", ",".join(["2"] * 97)], "97 tokens were given, the model reads at most 96"),
        (["hello", "--top", "0"], "--top is 0"),
    ],
)
def test_bad_use(run, arguments, words):
    code, out, err = run("logits", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_the_conversation_is_not_written_over(run, tmp_path):
    path = tmp_path / "m.npy"
    path.write_text('[{"role": "user", "content": "Hi"}]')
    code, out, err = run("logits", "--messages", str(path), "--output", str(path))
    assert (code, out) == (2, "")
    assert err.startswith("refgemma: --output and --messages are the same file, ")
    assert path.read_text().startswith("[")
