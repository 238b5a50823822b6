"""OpenAI's interface: what becomes of a request, whole answers and streams."""

import json

import pytest

from refgemma.workers_ai import AiError
from refgemma.workers_ai.pages import GEMMA_2B, GEMMA_7B
from refgemma.workers_ai.server.app import create_app
from refgemma.workers_ai.server.chat import read_chat
from refgemma.workers_ai.server.start import hosts_of
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import ACCOUNT, ask, events, sent, serving

CHAT = f"{ACCOUNT}/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]
BODY = {"model": GEMMA_2B, "messages": MESSAGES, "temperature": 0}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "The city"}}},
    },
}
PARIS = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.mark.parametrize("model", [GEMMA_2B, GEMMA_7B])
def test_a_completion_is_the_native_answer_in_other_words(address, ai, model):
    reply = ask(address, CHAT, BODY | {"model": model})
    native = ai.run(model, {"messages": MESSAGES, "temperature": 0})
    completion = reply.json
    assert list(completion) == ["id", "object", "created", "model", "choices", "usage"]
    assert (completion["object"], completion["model"], completion["usage"]) == (
        "chat.completion",
        model,
        native["usage"],
    )
    assert completion["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": native["response"]},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_adds_up_to_the_completion(address, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    *chunks, done = events(ask(address, CHAT, BODY | {"stream": True} | options).body)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    if usage:
        last = chunks.pop()
        assert (last["choices"], last["usage"]["total_tokens"]) == ([], 34)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == "17 + 25 = 42."
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_an_answer_that_was_cut_off_says_so(address):
    assert ask(address, CHAT, BODY | {"max_tokens": 3}).json["choices"][0]["finish_reason"] == "length"
    assert ask(address, CHAT, BODY | {"max_completion_tokens": 3}).json["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [True, False])
def test_stop_texts(address, stream):
    reply = ask(address, CHAT, BODY | {"stop": [" ="], "stream": stream})
    if stream:
        chunks = [chunk["choices"][0] for chunk in events(reply.body)[:-1]]
        text, reason = "".join(c["delta"].get("content", "") for c in chunks), chunks[-1]["finish_reason"]
    else:
        (choice,) = reply.json["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == ("17 + 25", "stop")


@pytest.mark.parametrize("stream", [True, False])
def test_tools_are_called_and_their_results_used(address, stream):
    reply = ask(address, CHAT, BODY | {"messages": PARIS, "tools": [WEATHER], "stream": stream})
    if stream:
        choices = [chunk["choices"][0] for chunk in events(reply.body)[:-1]]
        ((call,),) = [c["delta"]["tool_calls"] for c in choices if "tool_calls" in c["delta"]]
        assert (call.pop("index"), choices[-1]["finish_reason"]) == (0, "tool_calls")
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
    else:
        (choice,) = reply.json["choices"]
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        (call,) = message["tool_calls"]
    assert call["id"].startswith("chatcmpl-tool-")
    assert call["type"] == "function"
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "Paris"})
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"weather": "rainy", "degrees": 17}'}
    answer = ask(address, CHAT, BODY | {"messages": [*PARIS, message, result], "tools": [WEATHER]}).json
    assert "17 degrees" in answer["choices"][0]["message"]["content"]


def test_without_tool_choice_there_are_no_calls(address):
    reply = ask(address, CHAT, BODY | {"messages": PARIS, "tools": [WEATHER], "tool_choice": "none"})
    assert reply.json["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("given", "native"),
    [
        ({"temperature": None, "stop": None, "tools": None}, {}),
        ({"n": 1, "logprobs": False, "user": "me", "store": True}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}},
            {"response_format": {"type": "json_schema", "json_schema": {"type": "array"}}},
        ),
        ({"max_tokens": 3, "max_completion_tokens": 4}, {"max_tokens": 4}),
        ({"lora": "pirate", "top_k": 3}, {"lora": "pirate", "top_k": 3}),
    ],
)
def test_fields_and_what_they_become(given, native):
    body = {"model": "m", "messages": MESSAGES} | given
    assert read_chat(body).inputs == {"messages": MESSAGES, "stream": False} | native


@pytest.mark.parametrize(
    ("message", "native"),
    [
        ({"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "ab"},
        ),
        ({"role": "assistant", "content": "a", "tool_calls": None}, {"role": "assistant", "content": "a"}),
        ({"role": "user", "content": None}, {"role": "user", "content": None}),
        ("x", "x"),
    ],
)
def test_messages_and_what_they_become(message, native):
    assert read_chat({"model": "m", "messages": [message]}).inputs["messages"] == [native]


def test_tools_get_the_descriptions_that_the_page_wants():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}]
    (tool,) = read_chat({"model": "m", "messages": MESSAGES, "tools": tools}).inputs["tools"]
    parameters = {"type": "object", "properties": {"x": {"type": "integer", "description": ""}}}
    assert tool["function"] == {"name": "f", "description": "", "parameters": parameters}


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        None,
        {},
        {"model": 3},
        {"model": "m", "n": 2},
        {"model": "m", "n": True},
        {"model": "m", "logprobs": True},
        {"model": "m", "logit_bias": {"5": 1}},
        {"model": "m", "stop": ["a"] * 5},
        {"model": "m", "stop": [""]},
        {"model": "m", "stop": {"a": "\ud800"}},
        {"model": "m", "tool_choice": "required"},
        {"model": "m", "tool_choice": {"type": "function"}},
        {"model": "m", "stream_options": {"include_usage": True}},
        {"model": "m", "stream_options": 5},
    ],
)
def test_what_cannot_be_translated(wrong):
    with pytest.raises(AiError) as caught:
        read_chat(wrong)
    assert caught.value.code == 5006


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"messages": [{"role": "user", "content": None}]}, 400),
        ({"messages": "x"}, 400),
        ({"messages": None}, 400),
        ({"messages": []}, 400),
        ({"messages": [{}] * 8192}, 400),
        ({"messages": [{}] * 8191}, 400),
        ({"tools": [5]}, 400),
        ({"model": "gpt-4"}, 400),
        ({"stream": "yes"}, 400),
        ({"lora": "nothing"}, 404),
        ({"max_tokens": 0}, 400),
    ],
)
def test_the_native_rules_hold_for_the_rest(address, wrong, status):
    reply = ask(address, CHAT, BODY | wrong)
    assert reply.status == status
    assert list(reply.json) == ["errors", "success", "result", "messages", "error"]
    assert reply.json["error"]["message"].startswith(f"{reply.code}: ")  # where OpenAI's clients look
    assert "prompt'" not in reply.message  # a field that this interface has not


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("POST", CHAT, {}, 401, 10000),
        ("POST", CHAT, {"host": "evil.example"}, 403, 9109),
        ("POST", CHAT, {"origin": "http://evil.example"}, 403, 9109),
        ("POST", f"{ACCOUNT}/v1/nothing", {"authorization": "Bearer key"}, 404, 7000),
        ("GET", CHAT, {"authorization": "Bearer key"}, 405, 7001),
        ("POST", CHAT, {"authorization": "Bearer key"}, 500, 3043),
    ],
)
def test_errors_of_the_interface_stand_where_openai_s_clients_look(method, path, headers, status, code, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("planted, with a secret in it")

    app = create_app({GEMMA_2B: tiny_it()}, {}, token="key", hosts=hosts_of("127.0.0.1"))
    monkeypatch.setattr(app.state.service, "prepare", fail)
    with serving(app) as address:
        reply = ask(address, path, BODY, method=method, headers=headers)
        native = ask(address, path.replace("/v1/", "/v2/"), BODY, method=method, headers=headers)
    assert (reply.status, reply.code, reply.json["success"]) == (status, code, False)
    assert reply.json["error"]["code"] == str(code)
    assert reply.json["error"]["message"] in reply.message or status == 500
    assert "secret" not in reply.body.decode()
    assert "error" not in native.json


def test_a_stream_that_fails_half_way_ends_in_what_the_client_raises(endless, monkeypatch):
    def fail(self, scores):
        raise RuntimeError("planted, with a secret in it")

    with (
        serving(create_app({GEMMA_2B: endless}, {})) as address,
        sent(address, CHAT, BODY | {"stream": True, "max_tokens": 8000}) as response,
    ):
        response.readline(), response.readline()  # an event, and the empty line after it
        monkeypatch.setattr("refgemma.generation.Row.next", fail)
        *_, last = response.read().decode().split("\n\n")[:-1]
    error = json.loads(last.removeprefix("data: "))  # and no [DONE]
    assert list(error) == ["error"]
    assert error["error"] == {
        "message": "3043: Internal server error", "type": "server_error", "param": None, "code": "3043",
    }  # fmt: skip
