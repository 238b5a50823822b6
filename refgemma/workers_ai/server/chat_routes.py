"""OpenAI's interface over HTTP: whole completions, and the chunks of a stream."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from refgemma.generation import Generation
from refgemma.workers_ai.answer import DONE, Chunks, result, sse
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.server.body import parse, read_body
from refgemma.workers_ai.server.chat import ChatRequest, check_messages, read_chat
from refgemma.workers_ai.server.replies import openai_error, reply
from refgemma.workers_ai.server.service import Prepared, Service
from refgemma.workers_ai.server.streaming import Answer, EventStream, while_connected


def routes(service: Service) -> list[Route]:
    """Routes of OpenAI's interface."""

    async def completions(http: HttpRequest) -> Response | ASGIApp:
        chat, prepared = await service.turns.run(_prepare, service, await read_body(http))
        answer = await Answer(service, prepared).start()
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.model}
        if prepared.request.stream:
            return EventStream(answer, _events(answer, head, chat.include_usage, service.ai.pad), _last_words)
        try:
            generation = await while_connected(http.receive, answer.result())
        finally:
            answer.cancel()
        return reply(await asyncio.to_thread(_completion, generation, answer, head))

    return [Route("/v1/chat/completions", completions, methods=["POST"])]


def _prepare(service: Service, body: bytes) -> tuple[ChatRequest, Prepared]:
    chat = read_chat(parse(body))
    check_messages(chat)
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


def _last_words(error: AiError) -> dict[str, Any]:
    return openai_error(error.status, error.code, str(error))


def _head(head: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": head["id"], "object": kind, "created": head["created"], "model": head["model"]}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return {"id": f"chatcmpl-tool-{uuid.uuid4().hex}", "type": "function", "function": function}
