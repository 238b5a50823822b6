"""The object that users hold: loading, logits, scores, and the three ways to have a prompt answered."""

import json
import math
import shutil

import numpy as np
import pytest

import refgemma
import refgemma.gemma as module
from refgemma import generation
from refgemma.generation import PrefixCache
from refgemma.model import forward
from refgemma.numerics import FLOAT32, FLOAT64, Bfloat16Matrix, from_bfloat16, to_bfloat16
from refgemma.text import encode_chat
from tests.checkpoint.files import write_model
from tests.judge import FLOAT64_BOUND
from tests.models import map_params, random_model
from tests.talker import talker

CONTEXT = 1024
TEXT = "the world is a hello to the user, and it was for you that he asked the question. " * 40


@pytest.fixture(scope="module")
def model():
    """With weights that bfloat16 holds exactly."""
    model = talker(max_positions=CONTEXT)
    params = map_params(lambda w: from_bfloat16(to_bfloat16(w)), model.params)
    model.params.update(params)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, small_tokenizer):
    """The model as it would be downloaded."""
    folder = write_model(tmp_path_factory.mktemp("model") / "talker", model, "BF16")
    shutil.copy(small_tokenizer.path, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def gemma(folder):
    """In float64, where runs of different shapes agree to 1e-12 and no decision is that near to another."""
    return refgemma.load(folder, numerics="float64")


def pieces(gemma, count):
    """A text of so many tokens, <bos> not counted."""
    text = gemma.tokenizer.decode(gemma.tokenizer.encode(TEXT)[:count])
    assert len(gemma.tokenizer.encode(text)) == count
    return text


# ---- loading


@pytest.mark.parametrize(
    ("numerics", "weights", "dtype"),
    [
        ("float32", None, np.float32),
        ("float64", None, np.float64),
        ("float32", "float32", np.float32),
        ("float64", "float32", np.float32),
        ("float32", "bfloat16", None),
        ("float64", "bfloat16", None),
    ],
)
def test_load(folder, model, gemma, numerics, weights, dtype):
    loaded = refgemma.load(folder, numerics=numerics, weights=weights)
    assert loaded.config == model.config
    assert loaded.numerics is (FLOAT64 if numerics == "float64" else FLOAT32)
    assert loaded.tokenizer.vocab_size == 500
    assert loaded.params["final_norm"].dtype == loaded.numerics.dtype
    matrix = loaded.params["layers"][1]["mlp"]["gate"]
    assert isinstance(matrix, Bfloat16Matrix) if dtype is None else matrix.dtype == dtype
    tokens = [2, 30, 31, 400]
    got, want = loaded.logits(tokens), gemma.logits(tokens)
    assert got.dtype == loaded.numerics.dtype
    if numerics == "float64":  # the same numbers in the same arithmetic
        assert np.abs(got - want).max() <= FLOAT64_BOUND * np.abs(want).max()
    else:
        # Measured for float32: 2.5e-7 of the largest logit; room for other orders of summation.
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


def test_load_takes_a_path_or_a_text(folder):
    assert refgemma.load(str(folder)).config == refgemma.load(folder).config


def test_load_reports_progress(folder):
    seen = []
    refgemma.load(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"numerics": "float16"}, r"^numerics is 'float16': expected 'float32' or 'float64'$"),
        ({"numerics": None}, r"^numerics is None: expected"),
        ({"weights": "int8"}, r"^weights is 'int8': expected 'bfloat16', 'float32' or 'float64'$"),
        ({"weights": "float64"}, r"^weights are 'float64', wider than the arithmetic 'float32': "),
        ({"device": "cuda"}, r"^device is 'cuda': expected 'cpu'$"),
    ],
)
def test_load_refuses_unknown_settings(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        refgemma.load(folder, **settings)


def test_load_refuses_what_is_absent_or_does_not_belong_together(tmp_path, folder, small_tokenizer):
    with pytest.raises(FileNotFoundError):
        refgemma.load(tmp_path / "nothing")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model"):
        refgemma.load(bare)
    small = write_model(tmp_path / "small", random_model(0, vocab_size=499))
    shutil.copy(small_tokenizer.path, small / "tokenizer.model")
    with pytest.raises(ValueError, match="the tokenizer has 500 pieces, the embedding table 499 rows"):
        refgemma.load(small)


def test_stop_ids_are_those_of_the_vocabulary_and_of_the_folder(tmp_path, folder, gemma):
    tokenizer = gemma.tokenizer
    assert gemma.stop_ids == {tokenizer.eos_id, tokenizer.end_of_turn_id}
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 44]}))
    assert refgemma.load(other).stop_ids == {44, tokenizer.eos_id, tokenizer.end_of_turn_id}


# ---- prompts


def test_a_text_is_one_user_turn(gemma):
    conversation = [{"role": "user", "content": "Hello"}]
    ids = encode_chat(gemma.tokenizer, conversation)
    assert gemma.encode_prompt("Hello") == gemma.encode_prompt(conversation) == ids
    assert ids.count(gemma.tokenizer.start_of_turn_id) == 2
    assert gemma.encode_prompt(tuple(conversation)) == ids


def test_control_text_is_live_in_raw_prompts_alone(gemma):
    bos, turn = gemma.tokenizer.bos_id, gemma.tokenizer.start_of_turn_id
    assert gemma.encode_prompt("<start_of_turn>user", raw=True)[:2] == [bos, turn]
    assert gemma.encode_prompt("<bos>Hello", raw=True) == gemma.encode_prompt("Hello", raw=True)
    assert gemma.encode_prompt("Hello", raw=True) == gemma.tokenizer.encode("Hello", bos=True)
    assert gemma.encode_prompt("<start_of_turn>model").count(turn) == 2


@pytest.mark.parametrize("prompt", [5, None, b"Hello", {"role": "user", "content": "Hello"}, ["Hello"], [5]])
def test_prompts_of_another_type_are_one_clear_sentence(gemma, prompt):
    for call in (gemma.encode_prompt, gemma.generate, gemma.stream):
        with pytest.raises(TypeError, match="expected") as caught:
            call(prompt)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="expected a text"):
        gemma.encode_prompt(prompt, raw=True)


def test_a_conversation_cannot_be_raw(gemma):
    with pytest.raises(TypeError, match="expected a text"):
        gemma.generate([{"role": "user", "content": "Hello"}], raw=True)


def test_batches_of_another_type_are_one_clear_sentence(gemma):
    for prompts in ("Hello", 5, None, {"role": "user", "content": "Hello"}):
        with pytest.raises(TypeError, match=r"^prompts is a \w+: expected a list of prompts$"):
            gemma.generate_batch(prompts)
    with pytest.raises(TypeError, match="expected"):  # one conversation where a list of them is wanted
        gemma.generate_batch([{"role": "user", "content": "Hello"}])


# ---- logits


def test_logits_are_those_of_the_forward_pass(gemma):
    tokens = np.array([[2, 30, 31], [2, 40, 99]])
    want = forward(gemma.params, gemma.config, tokens, numerics=FLOAT64)
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
    want = forward(gemma.params, gemma.config, tokens[None], numerics=FLOAT64)[0]
    scale = np.abs(want).max()
    assert np.abs(gemma.logits(tokens) - want).max() <= FLOAT64_BOUND * scale
    float32 = refgemma.load(folder)
    whole = forward(float32.params, gemma.config, tokens[None])[0]
    gap = np.abs(whole - want).max()
    # Chunks sum in another order: an error of the same kind, as large as the unchunked one up to luck, hence 3.
    assert np.abs(float32.logits(tokens) - want).max() <= 3 * gap + 4 * 2**-24 * scale
    if length > chunk:  # it can fail: a second chunk that starts at position 0 again is seen
        restarted = forward(gemma.params, gemma.config, tokens[None, chunk:], numerics=FLOAT64)[0]
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


# ---- generate, generate_batch, stream


SETTINGS = {"seed": 4, "max_tokens": 16, "temperature": 1.0}
PROMPTS = ["Hello", [{"role": "user", "content": "the question of the world"}], "a"]


def test_the_three_ways_agree(gemma):
    alone = [gemma.generate(prompt, **SETTINGS) for prompt in PROMPTS]
    assert gemma.generate_batch(PROMPTS, **SETTINGS) == alone
    assert len({tuple(result.tokens) for result in alone}) == 3
    for prompt, result in zip(PROMPTS, alone, strict=True):
        events = list(gemma.stream(prompt, **SETTINGS))
        assert "".join(event.text for event in events) == result.text
        assert [event.token for event in events] == result.tokens
        assert [event.result for event in events] == [None] * (len(events) - 1) + [result]
        assert result.seed == 4
        assert result.usage.prompt_tokens == len(gemma.encode_prompt(prompt))
        assert result.usage.completion_tokens == len(result.tokens)
    assert gemma.generate_batch([]) == []


def test_raw_prompts_are_continued(gemma):
    raw = gemma.generate("Hello", raw=True, **SETTINGS)
    assert raw.usage.prompt_tokens == len(gemma.tokenizer.encode("Hello", bos=True))
    assert raw.tokens != gemma.generate("Hello", **SETTINGS).tokens
    assert gemma.generate_batch(["Hello"], raw=True, **SETTINGS) == [raw]
    assert list(gemma.stream("Hello", raw=True, **SETTINGS))[-1].result == raw


def test_greedy_text_is_the_most_likely_token_each_time(gemma):
    result = gemma.generate("Hello", temperature=0.0, max_tokens=10)
    prompt = gemma.encode_prompt("Hello")
    logits = gemma.logits(prompt + result.tokens)
    assert logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == result.tokens
    assert gemma.generate("Hello", temperature=0.0, max_tokens=10, seed=99).tokens == result.tokens


def test_float32_and_bfloat16_weights_write_the_same_text(folder, gemma):
    """Up to the first decision nearer than rounding, of which these seeds have none."""
    want = gemma.generate("Hello", **SETTINGS).tokens
    assert refgemma.load(folder).generate("Hello", **SETTINGS).tokens == want
    assert refgemma.load(folder, weights="bfloat16").generate("Hello", **SETTINGS).tokens == want


def test_stop_tokens_and_stop_texts_reach_the_run(gemma):
    plain = gemma.generate("Hello", **SETTINGS)
    assert plain.finish_reason == "length"
    stop = plain.text[len(plain.text) // 2 :][:3]
    stopped = gemma.generate("Hello", stop=stop, **SETTINGS)
    assert stopped.finish_reason == "stop"
    assert stopped.text == plain.text[: plain.text.index(stop)]
    ended = refgemma.Gemma(gemma.config, gemma.params, gemma.tokenizer, gemma.numerics, frozenset([plain.tokens[4]]))
    assert ended.generate("Hello", **SETTINGS).tokens == plain.tokens[: plain.tokens.index(plain.tokens[4]) + 1]


def test_an_unset_seed_is_drawn_and_reported(gemma):
    settings = SETTINGS | {"seed": None}
    result = gemma.generate("Hello", **settings)
    assert gemma.generate("Hello", **settings | {"seed": result.seed}) == result
    assert gemma.generate("Hello", **settings).seed != result.seed


def test_a_chat_with_a_prefix_cache_answers_as_without(gemma):
    prefix, messages = PrefixCache(), []
    for text in ("Hello", "the question", "and the world"):
        messages.append({"role": "user", "content": text})
        events = list(gemma.stream(messages, prefix=prefix, **SETTINGS))
        assert events[-1].result == gemma.generate(messages, **SETTINGS)
        assert prefix.tokens[: len(gemma.encode_prompt(messages))] == gemma.encode_prompt(messages)
        messages.append({"role": "assistant", "content": events[-1].result.text})


def test_progress_counts_the_prompt(gemma, monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", 16)
    seen = []
    prompt = pieces(gemma, 20)

    def progress(done, total):
        seen.append((done, total))

    total = 21
    gemma.generate(prompt, raw=True, progress=progress, max_tokens=1)
    gemma.generate_batch([prompt, "a"], raw=True, progress=progress, max_tokens=1)
    for _ in gemma.stream(prompt, raw=True, progress=progress, max_tokens=1):
        pass
    assert seen == [(16, total), (total, total)] * 3


def test_bad_settings_are_refused_before_anything_is_read(gemma):
    for call in (gemma.generate, gemma.stream, lambda prompt, **s: gemma.generate_batch([prompt], **s)):
        with pytest.raises(ValueError, match=r"^temperature is -1: expected"):
            call("Hello", temperature=-1)
        with pytest.raises(TypeError, match="max_token"):
            call("Hello", max_token=5)


def test_a_prompt_beyond_the_context_is_one_clear_sentence(gemma):
    with pytest.raises(ValueError, match=rf"^the prompt has \d+ tokens, .*{CONTEXT}"):
        gemma.generate("\N{SNOWMAN}" * 400)
