"""`refgemma score`: the library's log-probabilities, and averages of them in the units people quote."""

import json
import math

import pytest

TEXT = "hello world, h\u00e9llo!\n"


def test_figures(run, gemma):
    want = gemma.score(TEXT)
    code, out, err = run("score", TEXT, "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["tokens"] == want.tokens
    assert shown["pieces"] == [gemma.tokenizer.piece(token) for token in want.tokens]
    assert shown["logprobs"] == want.logprobs.tolist()
    assert shown["total"] == want.total
    assert shown["num_tokens"] == len(want.tokens) - 1  # <bos> is given, not predicted
    assert shown["num_bytes"] == 21  # the e with an accent has two
    bits = -want.total / math.log(2)
    # Two roundings more or less, of values that differ by no more than an exponential of one of about 10.
    assert shown["nats_per_token"] == pytest.approx(-want.total / shown["num_tokens"], rel=1e-15)
    assert shown["bits_per_token"] == pytest.approx(bits / shown["num_tokens"], rel=1e-15)
    assert shown["bits_per_byte"] == pytest.approx(bits / 21, rel=1e-15)
    assert shown["perplexity"] == pytest.approx(2 ** (bits / shown["num_tokens"]), rel=1e-13)


def test_the_table_has_a_line_for_each_token_and_the_figures(run, gemma):
    want = gemma.score("hello\n")
    lines = run("score", "hello\n")[1].splitlines()
    assert lines[1].split() == ["425", "hello", f"{want.logprobs[0]:.4f}"]
    assert lines[2].split() == ["13", r"\n", f"{want.logprobs[1]:.4f}"]
    assert lines[5].split() == ["total", f"{want.total:,.4f}"]
    assert lines[-1].startswith("perplexity")


def test_a_text_is_taken_exactly_wherever_it_comes_from(run, type_in, tmp_path):
    path = tmp_path / "text"
    path.write_bytes(TEXT.encode())
    type_in(TEXT.encode())
    printed = run("score", TEXT)
    assert run("score", "--file", str(path)) == printed
    assert run("score", "-") == printed
    assert run("score", TEXT.strip()) != printed


def test_control_text_counts_if_asked(run, gemma):
    plain, markers = (
        json.loads(run("score", "<end_of_turn>", "--json", *more)[1]) for more in ([], ["--control", "all"])
    )
    assert gemma.tokenizer.end_of_turn_id not in plain["tokens"]
    assert markers["tokens"] == [gemma.tokenizer.bos_id, gemma.tokenizer.end_of_turn_id]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no text was given"),
        (["text", "--file", "file"], "TEXT and --file were both given"),
        ([""], "the text is empty"),
        (["<bos>", "--control", "all"], "the text is empty"),
        (["--file", "absent.txt"], "cannot read absent.txt: "),
        (["hello " * 100], "the model reads at most 96"),
    ],
)
def test_bad_use(run, arguments, words):
    code, out, err = run("score", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
