"""From generated tokens to responses: the result of a whole answer, or the chunks of a stream and their exact bytes.

A stream consists of server-sent events, each ``data: {"response":"New"}`` and an empty line, in compact JSON and UTF-8.
Its last chunk has the token counts, and ``data: [DONE]`` ends it.

References
----------
https://github.com/cloudflare/cloudflare-docs/pull/19018 for the stream. Padding hides lengths from
eavesdroppers: https://blog.cloudflare.com/ai-side-channel-attack-mitigated/
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from refgemma.errors import InputError
from refgemma.generation import Event, Generation, Usage
from refgemma.text.tools import LONGEST_CALL, ToolCallError, parse_calls
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.request import Request
from refgemma.workers_ai.schema import Schema, join, loads, problems

DONE = b"data: [DONE]\n\n"
PADDING = "abdefghijklmnoprstuvxyz1234567890"  # as observed, repeated
LONGEST_PADDING = 50
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
SCHEMA: dict[str, Any] = {  # of `result`
    "type": "object",
    "properties": {
        "response": {"type": "string"},
        "tool_calls": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "arguments": {"type": "object"}},
                "required": ["name", "arguments"],
            },
        },
        "usage": {
            "type": "object",
            "properties": {f"{what}_tokens": {"type": "integer"} for what in ("prompt", "completion", "total")},
            "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
        },
    },
    "required": ["response", "usage"],
}


def result(generation: Generation, request: Request) -> dict[str, Any]:
    """Make the result of a whole answer."""
    counts = {"usage": _usage(generation.usage)}
    if calls := tool_calls(generation.text, request):
        return {"response": "", "tool_calls": calls, **counts}
    text = generation.text
    if request.answer_schema is not None:
        text = read_json(text, request.answer_schema)
    return {"response": text, **counts}


class Chunks:
    """Makes the chunks of one stream, event by event.

    If tools are declared, text that may be a call is held back until that is decided.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._held = ""
        self._may_be_call = bool(request.tools)

    def feed(self, event: Event) -> list[dict[str, Any]]:
        """Return the chunks that the next token completes."""
        self._held += event.text
        if self._held.strip():
            self._may_be_call &= self._held.lstrip()[0] in "[{" and len(self._held.strip()) <= LONGEST_CALL
        chunks: list[dict[str, Any]] = []
        if event.result is not None:
            calls = tool_calls(self._held, self._request) if self._may_be_call else []
            if calls:
                chunks.append({"response": "", "tool_calls": calls})
            elif self._held:
                chunks.append({"response": self._held})
            chunks.append({"response": "", "usage": _usage(event.result.usage)})
        elif self._held and not self._may_be_call:
            chunks.append({"response": self._held})
            self._held = ""
        return chunks


def chunks(events: Iterable[Event], request: Request) -> Iterator[dict[str, Any]]:
    """Yield the chunks of a stream."""
    stream = Chunks(request)
    for event in events:
        yield from stream.feed(event)


def sse(chunk: Mapping[str, Any], *, pad: bool = False) -> bytes:
    """Encode one event."""
    if pad:
        length = 1 + secrets.randbelow(LONGEST_PADDING)
        chunk = {**chunk, "p": (PADDING * 2)[:length]}
    return b"data: " + to_json(chunk) + b"\n\n"


def to_json(value: Any) -> bytes:
    """Encode compact JSON; unpaired surrogates are escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def tool_calls(text: str, request: Request) -> list[dict[str, Any]]:
    """Return the calls of declared tools in an answer."""
    try:
        return parse_calls(text, request.tools)
    except ToolCallError:
        return []


def read_json(text: str, schema: Schema) -> str:
    """Return the JSON of an answer, without a Markdown fence around it."""
    text = text.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1].strip()
    try:
        value = loads(text)
    except InputError:
        raise AiError(5024, f"JSON Mode couldn't be met: the answer is not JSON, it begins {text[:60]!r}") from None
    if found := problems(value, schema):
        raise AiError(5024, f"JSON Mode couldn't be met: {join(found)}")
    return text


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
