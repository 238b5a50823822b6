"""Logits and scores do not depend on the chunks they are computed in; bad tokens are one clear sentence."""

import math

import numpy as np
import pytest

import refgemma
import refgemma.gemma as module
from refgemma.model import forward
from refgemma.numerics import FLOAT64, to_host
from tests.gemma.texts import CONTEXT, TEXT, pieces
from tests.judge import FLOAT64_BOUND


def test_logits_are_those_of_the_forward_pass(gemma):
    tokens = np.array([[2, 30, 31], [2, 40, 99]])
    want = to_host(forward(gemma.params, gemma.config, tokens, numerics=FLOAT64))
    scale = np.abs(want).max()
    both = gemma.logits(tokens)
    assert both.shape == (2, 3, 500)
    assert np.abs(both - want).max() <= FLOAT64_BOUND * scale
    for given in (tokens[1], tokens[1].tolist(), tuple(tokens[1].tolist()), tokens[1].astype(np.uint16)):
        one = gemma.logits(given)
        assert one.shape == (3, 500)
        assert np.abs(one - want[1]).max() <= FLOAT64_BOUND * scale


@pytest.mark.parametrize(("length", "chunk"), [(1, 512), (513, 512), (64, 64), (129, 64), (150, 64)])
def test_logits_do_not_depend_on_chunks(gemma, folder, monkeypatch, length, chunk):
    assert module.CHUNK == 512
    monkeypatch.setattr(module, "CHUNK", chunk)
    tokens = np.array(gemma.tokenizer.encode(TEXT, bos=True)[:length])
    want = to_host(forward(gemma.params, gemma.config, tokens[None], numerics=FLOAT64))[0]
    scale = np.abs(want).max()
    assert np.abs(gemma.logits(tokens) - want).max() <= FLOAT64_BOUND * scale
    float32 = refgemma.load(folder)
    whole = forward(float32.params, gemma.config, tokens[None])[0]
    gap = np.abs(whole - want).max()
    # Chunks sum in another order: an error of the same kind, as large as the unchunked one up to luck, hence 3.
    assert np.abs(float32.logits(tokens) - want).max() <= 3 * gap + 4 * 2**-24 * scale
    if length > chunk:  # it can fail: a second chunk that starts at position 0 again is seen
        restarted = to_host(forward(gemma.params, gemma.config, tokens[None, chunk:], numerics=FLOAT64))[0]
        assert np.abs(restarted - want[chunk:]).max() > 1e-3 * scale


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[2, 30], [2]], r"^tokens have rows of different lengths: expected shape \(T,\) or \(B, T\)"),
        ([[[2]]], r"^tokens have shape \(1, 1, 1\): expected \(T,\) or \(B, T\)"),
        (2, r"^tokens have shape \(\): expected"),
        ("Hello", r"^tokens have shape \(\): expected"),
        ([], r"^tokens have shape \(0,\): expected .* at least one of each"),
        ([[], []], r"^tokens have shape \(2, 0\): expected"),
        ([2.0, 3.0], r"^tokens have dtype float64: expected whole numbers"),
        ([True, False], r"^tokens have dtype bool: expected whole numbers"),
        (["a", "b"], r"^tokens have dtype <U1: expected whole numbers"),
        ([2, 500], r"^token id 500 is outside the vocabulary of 500"),
        ([2, -1], r"^token id -1 is outside the vocabulary of 500"),
        ([2] * (CONTEXT + 1), rf"^{CONTEXT + 1} tokens were given, .* {CONTEXT}"),
    ],
)
def test_bad_tokens_are_one_clear_sentence(gemma, tokens, message):
    with pytest.raises(ValueError, match=message) as caught:
        gemma.logits(tokens)
    assert "\n" not in str(caught.value)


# ---- score


def log_softmax_by_hand(row, token):
    top = max(row)
    return row[token] - top - math.log(math.fsum(math.exp(v - top) for v in row))


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 257])
def test_score_is_the_log_softmax_of_the_logits(gemma, length):
    """Of each token given those before it, over the borders of chunks of 128 too."""
    text = pieces(gemma, length)
    score = gemma.score(text)
    assert score.tokens == gemma.tokenizer.encode(text, bos=True)
    assert score.logprobs.dtype == np.float64
    assert score.logprobs.shape == (length,)
    logits = gemma.logits(score.tokens)
    want = np.array([log_softmax_by_hand(logits[t].tolist(), score.tokens[t + 1]) for t in range(length)])
    # Both logits are within the bound of the truth; log-softmax is a difference of two numbers that move by as much.
    bound = 4 * FLOAT64_BOUND * np.abs(logits).max()
    assert np.abs(score.logprobs - want).max() <= bound
    assert abs(score.total - math.fsum(want)) <= length * bound
    assert np.all(score.logprobs < 0)
    if length > 1:  # it can fail: the probability of the token itself, not of the next one, is seen
        shifted = np.array([log_softmax_by_hand(logits[t].tolist(), score.tokens[t]) for t in range(length)])
        assert np.abs(score.logprobs - shifted).max() > 1e-3


def test_score_over_more_than_one_chunk_of_anything(gemma):
    """Of the logits' chunks of 512 as of its own of 128."""
    score = gemma.score(pieces(gemma, 515))
    logits = gemma.logits(score.tokens)
    for t in (0, 127, 128, 511, 512, 514):
        want = log_softmax_by_hand(logits[t].tolist(), score.tokens[t + 1])
        assert abs(score.logprobs[t] - want) <= 4 * FLOAT64_BOUND * np.abs(logits).max()


def test_score_in_float32(folder, gemma):
    text = pieces(gemma, 200)
    got, want = refgemma.load(folder).score(text), gemma.score(text)
    assert got.logprobs.dtype == np.float64
    # Logits in float32 are off by 2e-6 of the largest, about 10, as in `test_load`; a difference doubles that.
    assert np.abs(got.logprobs - want.logprobs).max() <= 2 * 2e-6 * np.abs(gemma.logits(want.tokens)).max()


def test_score_never_holds_the_logits_of_a_long_text(gemma, monkeypatch):
    widths = []

    def counting(params, config, tokens, **arguments):
        widths.append(tokens.shape[1])
        return forward(params, config, tokens, **arguments)

    monkeypatch.setattr(module, "forward", counting)
    gemma.score(pieces(gemma, 300))
    assert widths == [128, 128, 45]


def test_score_of_nothing_is_one(gemma):
    score = gemma.score("")
    assert score.tokens == [gemma.tokenizer.bos_id]
    assert score.logprobs.shape == (0,)
    assert score.total == 0.0


def test_score_takes_control_text_as_told(gemma):
    text, turn = "<start_of_turn>user", gemma.tokenizer.start_of_turn_id
    assert turn not in gemma.score(text).tokens
    assert turn in gemma.score(text, control="markers").tokens
    assert gemma.score("<bos>Hello", control="all").tokens == gemma.score("Hello").tokens


def test_score_refuses_what_it_cannot_read(gemma):
    with pytest.raises(ValueError, match=rf"^{CONTEXT + 1} tokens were given, .* {CONTEXT}"):
        gemma.score("\N{SNOWMAN}" * (CONTEXT // 3) + "a")  # three tokens each, and <bos>
    with pytest.raises(TypeError, match="expected a str"):
        gemma.score(5)
    with pytest.raises(ValueError, match="control is 'some'"):
        gemma.score("Hello", control="some")


@pytest.mark.parametrize("shape", [(), (2,)], ids=["one row", "two rows"])
def test_last_logits_are_the_last_of_all(gemma, shape):
    tokens = np.random.default_rng(3).integers(0, 300, size=(*shape, 30))
    seen = []
    last = gemma.logits(tokens, last=True, progress=lambda read, total: seen.append((read, total)))
    assert seen == [(30, 30)]
    everything = gemma.logits(tokens)
    bound = 2 * FLOAT64_BOUND * np.abs(everything).max()  # each is within the bound of the truth
    assert np.abs(last - everything[..., -1, :]).max() <= bound
    assert np.abs(last - everything[..., -2, :]).max() > 1e6 * bound
