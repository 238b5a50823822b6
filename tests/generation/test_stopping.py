"""What ends a text, and what of it comes out when."""

import pytest

from refgemma.generation import Usage
from refgemma.text.streaming import split_at_stop
from tests.generation.runs import CONTEXT, results

STOPS = {  # text, stop texts, what comes out
    "inside a token": (" hello password user", ["ssw"], " hello pa"),
    "over a token border": (" hello world user", ["o w"], " hell"),
    "over three tokens": (" hello in it of user", ["o in it o"], " hell"),
    "a whole token": (" hello world user", [" world"], " hello"),
    "the very beginning": (" hello world", [" hello"], ""),
    "the very end": (" hello world", ["rld"], " hello wo"),
    "the first of two": (" hello world user", ["user", "world"], " hello "),
    "the first of one text": (" the the the", ["the"], " "),
    "one that begins another": (" hello world", ["wor", "world"], " hello "),
    "one that another begins": (" hello world", ["world", "wor"], " hello "),
    "one inside another": (" hello world", ["hello world", "world"], " "),
    "one that begins and does not come true": (" hello world user", ["worm", "orb"], " hello world user"),
    "one that begins twice": (" hehehello", ["hehell"], " he"),
    "one that begins at the end": (" hello world", ["world is"], " hello world"),
    "a line end": ("hello\n\nworld", ["\n\n"], "hello"),
    "bytes of one character": ("hello \N{SNOWMAN} world", ["\N{SNOWMAN} w"], "hello "),
    "a character that begins like the stop's": ("hello \N{COMET} world", ["\N{SNOWMAN}"], "hello \N{COMET} world"),
    "none": (" hello world", [], " hello world"),
}


@pytest.mark.parametrize("split", ["tokens", "characters"])
@pytest.mark.parametrize("case", STOPS)
def test_stop_texts(case, split, play, small_tokenizer):
    text, stops, want = STOPS[case]
    runs = [text] if split == "tokens" else text
    output = [i for run in runs for i in small_tokenizer.encode(run)]
    events = play([*output, small_tokenizer.eos_id], stop_ids=[small_tokenizer.eos_id], stop=stops)
    result = events[-1].result
    assert result.text == want
    assert result.finish_reason == "stop"
    assert "".join(event.text for event in events) == want
    assert [event.token for event in events] == result.tokens == [*output, small_tokenizer.eos_id][: len(events)]
    if want == text:
        assert result.tokens[-1] == small_tokenizer.eos_id
    else:
        # It stops at the first token that completes a stop text, and not before.
        assert len(result.tokens) == next(
            n for n in range(len(output) + 1) if any(stop in small_tokenizer.decode(output[:n]) for stop in stops)
        )


def test_the_cases_of_stop_texts_are_what_they_say(small_tokenizer):
    assert len(small_tokenizer.encode(" password")) == 1
    assert len(small_tokenizer.encode(" hello world")) == 2
    assert len(small_tokenizer.encode("\N{SNOWMAN}")) == 3
    assert small_tokenizer.encode("\N{SNOWMAN}")[:1] == small_tokenizer.encode("\N{COMET}")[:1]


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("abc", [], ("abc", "", False)),
        ("abc", ["bcd"], ("a", "bc", False)),
        ("abc", ["cab", "bcd"], ("a", "bc", False)),
        ("abab", ["ababc"], ("", "abab", False)),
        ("aab", ["abab"], ("a", "ab", False)),
        ("abcd", ["cd", "b"], ("a", "", True)),
        ("", ["a"], ("", "", False)),
        ("aaaa", ["aaaaa"], ("", "aaaa", False)),
        ("xaaaa", ["aa"], ("x", "", True)),
    ],
)
def test_split_at_stop(text, stops, want):
    assert split_at_stop(text, stops) == want


def test_text_is_released_as_soon_as_it_is_certain(play, small_tokenizer):
    output = small_tokenizer.encode(" hello world the user")
    texts = [event.text for event in play(output, max_tokens=4, stop=["world is"])]
    assert texts == [" hello", " ", "world the", " user"]
    texts = [event.text for event in play(output, max_tokens=2, stop=["world is"])]
    assert texts == [" hello", " world"]  # at the end nothing is held back


def test_half_a_character_is_not_released(play, small_tokenizer):
    snowman = small_tokenizer.encode("\N{SNOWMAN}")
    assert [event.text for event in play(snowman, max_tokens=3)] == ["", "", "\N{SNOWMAN}"]
    assert [event.text for event in play(snowman, max_tokens=2)] == ["", "\ufffd\ufffd"]  # one a byte, as `decode` does
    cut = play([*snowman[:2], small_tokenizer.eos_id], stop_ids=[small_tokenizer.eos_id])
    assert [event.text for event in cut] == ["", "", "\ufffd\ufffd"]


def test_a_stop_text_in_the_last_token_allowed_is_a_stop(play, small_tokenizer):
    output = small_tokenizer.encode(" hello world user")
    result = play(output, max_tokens=2, stop="world")[-1].result
    assert (result.text, result.finish_reason) == (" hello ", "stop")


def test_stop_tokens_end_a_row_and_are_no_text(play, small_tokenizer):
    hello = small_tokenizer.encode(" hello")
    for stop in (small_tokenizer.eos_id, small_tokenizer.end_of_turn_id, hello[0]):
        result = play([*hello * 2, stop, *hello], stop_ids=[stop])[-1].result
        ended = 1 if stop == hello[0] else 3
        assert result.tokens == [*hello * 2, stop][:ended]
        assert result.text == " hello" * (ended - 1)
        assert result.finish_reason == "stop"
        assert result.usage == Usage(prompt_tokens=1, completion_tokens=ended)
    # A marker that is no stop token is text, a control is not.
    output = [small_tokenizer.end_of_turn_id, small_tokenizer.bos_id, *hello]
    assert play(output, max_tokens=3)[-1].result.text == "<end_of_turn> hello"


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_max_tokens(play, small_tokenizer, max_tokens):
    result = play(small_tokenizer.encode(" hello") * 9, max_tokens=max_tokens)[-1].result
    assert result.finish_reason == "length"
    assert result.text == " hello" * max_tokens
    assert result.usage == Usage(prompt_tokens=1, completion_tokens=max_tokens)
    assert result.usage.total_tokens == 1 + max_tokens


@pytest.mark.parametrize("room", [1, 2, 10])
def test_the_end_of_the_context(run, room):
    [result] = results(run([2] * (CONTEXT - room), seed=1, max_tokens=1000))
    assert result.finish_reason == "length"
    assert len(result.tokens) == room


def test_a_prompt_that_leaves_no_room_is_one_clear_sentence(run):
    for length in (CONTEXT, CONTEXT + 5):
        with pytest.raises(
            ValueError, match=rf"^the prompt has {length} tokens, .* context of {CONTEXT} .*: shorten it$"
        ):
            list(run([2], [2] * length))


def test_an_empty_prompt_is_one_clear_sentence(run):
    with pytest.raises(ValueError, match=r"^the prompt has no tokens: expected at least <bos>$"):
        list(run([2], []))
    assert list(run()) == []


def test_tokens_outside_the_vocabulary_are_one_clear_sentence(run):
    with pytest.raises(ValueError, match=r"^token id 500 is outside the vocabulary of 500"):
        list(run([2, 500]))
