"""The run route: the same answers as from Python, in the envelope or as the very bytes of the stream."""

import json

import pytest

from refgemma.workers_ai.pages import GEMMA_2B, GEMMA_7B
from tests.workers_ai.server.live import ACCOUNT, RUN, ask, events

QUESTION = {"prompt": "What is 17 + 25?", "temperature": 0}


def test_an_answer_comes_in_the_documented_envelope(address):
    reply = ask(address, RUN, QUESTION)
    assert reply.headers["content-type"] == "application/json"
    assert reply.body == (
        b'{"result":{"response":"17 + 25 = 42.","usage":{"prompt_tokens":22,"completion_tokens":12,"total_tokens":34}},'
        b'"success":true,"errors":[],"messages":[]}'
    )


@pytest.mark.parametrize("model", [GEMMA_2B, GEMMA_7B])
@pytest.mark.parametrize("extra", [{}, {"lora": "pirate"}, {"temperature": 1.5, "seed": 7, "top_k": 40}])
def test_answers_are_those_of_python(address, ai, model, extra):
    inputs = QUESTION | extra
    assert ask(address, f"{ACCOUNT}/run/{model}", inputs).result == ai.run(model, inputs)


def test_a_stream_is_that_of_python_byte_for_byte(address, ai):
    inputs = {"prompt": "Tell me a story about a fox.", "seed": 3, "stream": True}
    reply = ask(address, RUN, inputs)
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.body == b"".join(ai.run(GEMMA_2B, inputs))
    assert reply.body.endswith(b"data: [DONE]\n\n")


def test_tools_are_called_over_http_and_the_answer_uses_the_result(address):
    weather = {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "The city"}}},
    }
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    inputs = {"messages": messages, "tools": [weather], "temperature": 0}
    (call,) = ask(address, RUN, inputs).result["tool_calls"]
    assert call == {"name": "get_weather", "arguments": {"city": "Paris"}}
    messages += [
        {"role": "assistant", "content": json.dumps(call)},
        {"role": "tool", "name": "get_weather", "content": '{"weather": "rainy", "degrees": 17}'},
    ]
    assert "17 degrees" in ask(address, RUN, inputs).result["response"]
    streamed = events(ask(address, RUN, inputs | {"messages": messages[:1], "stream": True}).body)
    assert streamed[0] == {"response": "", "tool_calls": [call]}


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "application/json", "x/y; z"])
def test_the_body_is_json_whatever_its_type_says(address, kind):
    assert ask(address, RUN, QUESTION, headers={"content-type": kind}).result["response"] == "17 + 25 = 42."


def test_a_model_name_may_be_percent_encoded(address):
    path = f"{ACCOUNT}/run/{GEMMA_2B}".replace("@", "%40").replace("/google/", "%2Fgoogle%2F")
    assert ask(address, path, QUESTION).result["response"] == "17 + 25 = 42."
