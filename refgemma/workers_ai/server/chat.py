"""OpenAI's interface, ``…/ai/v1/chat/completions``: its requests become native ones, and native answers its own.

What such a request may hold beyond a native one has the same effect here, or cannot affect the answer, or is refused.

References
----------
https://developers.cloudflare.com/workers-ai/configuration/open-ai-compatibility/
https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from refgemma.generation import Generation
from refgemma.workers_ai.answer import DONE, Chunks, result, sse
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.pages import HOSTED, page
from refgemma.workers_ai.request import check_counts, check_depth
from refgemma.workers_ai.schema import join, problems, short
from refgemma.workers_ai.server.http import openai_error, parse, read_body, reply
from refgemma.workers_ai.server.service import Prepared, Service
from refgemma.workers_ai.server.streaming import Answer, EventStream

# Fields with the same name and meaning in both.
_SAME = ("temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty", "lora")
# Fields that cannot affect an answer while they have these values; with others they are refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"n": (1,), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},)}
_MOST_STOPS = 4


class ChatRequest(NamedTuple):
    """A native request, and the settings that it has no field for."""

    model: str
    inputs: dict[str, Any]
    stop: tuple[str, ...]
    include_usage: bool


def read_chat(body: Any) -> ChatRequest:
    """Translate a request."""
    if not isinstance(body, dict):
        raise AiError(5006, "the body is not an object: expected model and messages")
    given = {name: value for name, value in body.items() if value is not None}
    if not isinstance(given.get("model"), str):
        raise AiError(5006, "required properties at '/' are 'model'")
    for name, values in _NEUTRAL.items():
        if name in given and not any(given[name] == value and type(given[name]) is type(value) for value in values):
            raise AiError(5006, f"'/{name}' is not supported here: leave it out")
    if given["model"] in HOSTED:  # an unknown one is refused where it is looked up
        its_page = page(given["model"])
        check_counts(given, its_page, its_page.fields("messages"))
    inputs = {name: given[name] for name in _SAME if name in given}
    if "max_completion_tokens" in given or "max_tokens" in given:
        inputs["max_tokens"] = given.get("max_completion_tokens", given.get("max_tokens"))
    if "messages" in given:
        inputs["messages"] = _messages(given["messages"])
    if _wants_tools(given):
        inputs["tools"] = _tools(given["tools"])
    if (wanted := _format(given.get("response_format"))) is not None:
        inputs["response_format"] = wanted
    stream = given.get("stream", False)
    inputs["stream"] = stream
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or (options and stream is not True):
        raise AiError(5006, "'/stream_options' must be an object, and goes with '/stream'")
    return ChatRequest(given["model"], inputs, _stop(given.get("stop")), options.get("include_usage") is True)


def _check_messages(chat: ChatRequest) -> None:
    """Validate a request by the messages branch of its page's schema.

    The whole schema, which validates it afterwards, would report a missing `prompt`, which this interface has not.
    """
    if chat.model not in HOSTED:
        return
    check_depth(chat.inputs)
    if found := problems(chat.inputs, page(chat.model).branch("messages")):
        raise AiError(5006, join(found))


def _messages(messages: Any) -> Any:
    """Translate messages; malformed ones are left for the schema to report."""
    return list(map(_message, messages)) if isinstance(messages, list) else messages


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    role, content = message.get("role"), message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    calls = message.get("tool_calls")
    plain = {name: value for name, value in message.items() if name != "tool_calls" or calls}
    return plain | {"role": "system" if role == "developer" else role, "content": content}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _wants_tools(given: Mapping[str, Any]) -> bool:
    choice = given.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise AiError(5006, '\'/tool_choice\' must be one of "auto", "none": generation cannot be forced here')
    return "tools" in given and choice == "auto"


def _tools(tools: Any) -> Any:
    """Add the descriptions that the page's schema requires everywhere, and OpenAI does not."""
    return list(map(_tool, tools)) if isinstance(tools, list) else tools


def _tool(tool: Any) -> Any:
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        return tool
    function = {"description": "", "parameters": {}} | tool["function"]
    parameters = function["parameters"]
    if isinstance(parameters, dict):
        parameters = {"type": "object", "properties": {}} | parameters
        if isinstance(parameters["properties"], dict):
            parameters["properties"] = {n: _described(p) for n, p in parameters["properties"].items()}
        function["parameters"] = parameters
    return tool | {"function": function}


def _described(declared: Any) -> Any:
    return {"type": "string", "description": ""} | declared if isinstance(declared, dict) else declared


def _format(wanted: Any) -> Any:
    if isinstance(wanted, dict) and wanted.get("type") == "text":
        return None
    if isinstance(wanted, dict) and isinstance(wanted.get("json_schema"), dict) and "schema" in wanted["json_schema"]:
        return wanted | {"json_schema": wanted["json_schema"]["schema"]}
    return wanted


def _stop(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(texts, list) or len(texts) > _MOST_STOPS or not all(isinstance(t, str) and t for t in texts):
        raise AiError(5006, f"'/stop' is {short(json.dumps(stop))}: expected at most {_MOST_STOPS} texts, none empty")
    return tuple(texts)


def routes(service: Service) -> list[Route]:
    """Make the route."""

    async def completions(http: HttpRequest) -> Response | ASGIApp:
        chat, prepared = await service.preparation.run(_prepare, service, await read_body(http))
        answer = await Answer(service, prepared).start()
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.model}
        if prepared.request.stream:
            return EventStream(answer, _events(answer, head, chat.include_usage, service.ai.pad), _stream_error)
        generation = await answer.result(http.receive)
        return reply(await asyncio.to_thread(_completion, generation, answer, head))

    return [Route("/v1/chat/completions", completions, methods=["POST"])]


def _prepare(service: Service, body: bytes) -> tuple[ChatRequest, Prepared]:
    chat = read_chat(parse(body))
    _check_messages(chat)
    return chat, service.prepare(chat.model, chat.inputs, stop=chat.stop)


def _completion(generation: Generation, answer: Answer, head: dict[str, Any]) -> dict[str, Any]:
    native = result(generation, answer.prepared.request)
    calls = [_call(call) for call in native.get("tool_calls", ())]
    message = {"role": "assistant", "content": None if calls else native["response"]}
    choice = {
        "index": 0,
        "message": message | ({"tool_calls": calls} if calls else {}),
        "logprobs": None,
        "finish_reason": "tool_calls" if calls else generation.finish_reason,
    }
    return {**_head(head, "chat.completion"), "choices": [choice], "usage": native["usage"]}


async def _events(answer: Answer, head: dict[str, Any], include_usage: bool, pad: bool) -> AsyncIterator[bytes]:
    head = _head(head, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return sse({**head, "choices": [choice]}, pad=pad)

    yield chunk({"role": "assistant", "content": ""})
    chunks, called = Chunks(answer.prepared.request), False
    usage: dict[str, int] = {}
    async for event in answer:
        for native in chunks.feed(event):
            usage = native.get("usage", usage)
            if calls := native.get("tool_calls"):
                called = True
                yield chunk({"tool_calls": [{"index": i, **_call(call)} for i, call in enumerate(calls)]})
            elif native["response"]:
                yield chunk({"content": native["response"]})
        if event.result is not None:
            yield chunk({}, "tool_calls" if called else event.result.finish_reason)
    if include_usage:
        yield sse({**head, "choices": [], "usage": usage}, pad=pad)
    yield DONE


def _stream_error(error: AiError) -> dict[str, Any]:
    return openai_error(error.status, error.code, str(error))


def _head(head: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": head["id"], "object": kind, "created": head["created"], "model": head["model"]}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return {"id": f"chatcmpl-tool-{uuid.uuid4().hex}", "type": "function", "function": function}
