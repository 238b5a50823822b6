"""From events to chunks and their bytes."""

import json

import pytest

from refgemma.generation import Event, Generation, Usage
from refgemma.text.tools import LONGEST_CALL
from refgemma.workers_ai import AiError, read
from refgemma.workers_ai.answer import DONE, LONGEST_PADDING, PADDING, chunks, result, sse, to_json
from refgemma.workers_ai.pages import GEMMA_2B
from tests.workers_ai.keyword_cases import FORMS, TOOL

CALL = '[get_weather(city="Paris")]'
CALLS = [{"name": "get_weather", "arguments": {"city": "Paris"}}]
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def generation(text):
    usage = Usage(prompt_tokens=5, completion_tokens=3)
    return Generation(text=text, tokens=[1, 2, 3], finish_reason="stop", usage=usage, seed=7)


def events(*texts):
    """Events with these texts, as a generation makes them; what a token decided plays no part here."""
    whole = generation("".join(texts))
    last = len(texts) - 1
    return [
        Event(text=text, token=i, row=0, decision=None, result=whole if i == last else None)
        for i, text in enumerate(texts)
    ]


def request(**fields):
    return read(GEMMA_2B, FORMS["messages"] | fields)


def test_a_whole_answer():
    assert list(result(generation("Hello"), request()).items()) == [("response", "Hello"), ("usage", USAGE)]


def test_calls_of_declared_tools_are_taken_out():
    whole = result(generation(CALL), request(tools=[TOOL]))
    assert list(whole.items()) == [("response", ""), ("tool_calls", CALLS), ("usage", USAGE)]
    assert result(generation(CALL), request()) == {"response": CALL, "usage": USAGE}


@pytest.mark.parametrize(
    "text", ["[get_time()]", '[get_weather(town="Paris")]', '[get_weather(city="Pa', "[1, 2]", "5"]
)
def test_text_that_is_not_a_call_stays_text(text):
    assert result(generation(text), request(tools=[TOOL])) == {"response": text, "usage": USAGE}
    streamed = list(chunks(events(*text), request(tools=[TOOL])))
    assert "".join(chunk["response"] for chunk in streamed) == text
    assert all("tool_calls" not in chunk for chunk in streamed)


def test_an_answer_that_must_be_json():
    asked = request(response_format={"type": "json_object"}, tools=[TOOL])
    assert result(generation('{"a": 1}'), asked)["response"] == '{"a": 1}'
    assert result(generation(CALL), asked)["tool_calls"] == CALLS  # a call is not an answer yet
    with pytest.raises(AiError, match="JSON Mode couldn't be met"):
        result(generation("Hello"), asked)


def test_a_stream_has_a_chunk_for_each_text_and_counts_at_the_end():
    assert list(chunks(events("New", "", " York", ""), request())) == [
        {"response": "New"},
        {"response": " York"},
        {"response": "", "usage": USAGE},
    ]
    assert list(chunks(events("New", " York"), request())) == [
        {"response": "New"},
        {"response": " York"},
        {"response": "", "usage": USAGE},
    ]


def test_what_may_become_a_call_is_held_back():
    asked = request(tools=[TOOL])
    assert list(chunks(events(" ", *CALL, ""), asked)) == [
        {"response": "", "tool_calls": CALLS},
        {"response": "", "usage": USAGE},
    ]
    assert [chunk["response"] for chunk in chunks(events("\n", " It", " is", " [5]", ""), asked)] == [
        "\n It",
        " is",
        " [5]",
        "",
    ]
    # Without tools nothing is held; and nothing is held that is too long to be one.
    assert [chunk["response"] for chunk in chunks(events("[", "5", "]", ""), request())] == ["[", "5", "]", ""]
    long = "[" + "x" * LONGEST_CALL
    assert [chunk["response"] for chunk in chunks(events(long, "y", ""), asked)] == [long, "y", ""]


def test_a_stream_without_an_end_counts_nothing():
    assert list(chunks(events("New", " York")[:1], request())) == [{"response": "New"}]


def test_the_bytes_of_an_event():
    assert sse({"response": "New"}) == b'data: {"response":"New"}\n\n'
    assert DONE == b"data: [DONE]\n\n"
    # A line feed would end the event, a carriage return too; both stay escaped, other characters stay themselves.
    assert sse({"response": 'a\n\r"\u2028é🌧</'}) == 'data: {"response":"a\\n\\r\\"\u2028é🌧</"}\n\n'.encode()


def test_padding_is_a_prefix_of_what_was_observed():
    lengths = set()
    for _ in range(300):
        event = sse({"response": "x", "usage": USAGE}, pad=True)
        chunk = json.loads(event.removeprefix(b"data: "))
        assert list(chunk) == ["response", "usage", "p"]
        assert (PADDING * 2).startswith(chunk["p"])
        lengths.add(len(chunk["p"]))
    # 300 draws of 50 lengths; fewer than 20 different ones would come up once in 10**60 years of testing.
    assert len(lengths) > 20
    assert min(lengths) >= 1
    assert max(lengths) <= LONGEST_PADDING
    assert not set("cqw") & set(PADDING)
    assert len(PADDING) == 33


def test_json_can_always_be_sent():
    half = "\ud83c"  # has no UTF-8, and may stand in the name of a field that an error message quotes
    assert to_json({"message": half}) == b'{"message":"\\ud83c"}'
    assert json.loads(to_json({"message": half}))["message"] == half
