"""Prompts of every kind, and the three ways to have them answered."""

import pytest

import refgemma
from refgemma import generation
from refgemma.cache import PrefixCache
from refgemma.text import encode_chat
from tests.gemma.texts import CONTEXT, pieces


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
    # Within a chunk, each layer but the last counts as its share of the chunk's tokens.
    L = gemma.config.num_layers
    first = [(16 * i // L, total) for i in range(1, L + 1)]
    assert seen == [*first, *((16 + 5 * i // L, total) for i in range(1, L + 1))] * 3


def test_bad_settings_are_refused_before_anything_is_read(gemma):
    for call in (gemma.generate, gemma.stream, lambda prompt, **s: gemma.generate_batch([prompt], **s)):
        with pytest.raises(ValueError, match=r"^temperature is -1: expected"):
            call("Hello", temperature=-1)
        with pytest.raises(TypeError, match="max_token"):
            call("Hello", max_token=5)


def test_a_prompt_beyond_the_context_is_one_clear_sentence(gemma):
    with pytest.raises(ValueError, match=rf"^the prompt has \d+ tokens, .*{CONTEXT}"):
        gemma.generate("\N{SNOWMAN}" * 400)
