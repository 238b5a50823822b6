"""From generated tokens to what is sent: the result of a whole answer, or the chunks of a stream and their exact bytes.

A stream is lines of server-sent events, ``data: {"response":"New"}`` and an empty line each, compact JSON in UTF-8; its
last chunk counts the tokens, and ``data: [DONE]`` ends it.

References
----------
https://github.com/cloudflare/cloudflare-docs/pull/19018 for the stream. Padding against eavesdroppers who measure
lengths: https://blog.cloudflare.com/ai-side-channel-attack-mitigated/
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from refgemma.generation import Event, Generation, Usage
from refgemma.text.tools import LONGEST_CALL, ToolCallError, parse_calls
from refgemma.workers_ai.json_mode import read_json
from refgemma.workers_ai.request import Request

DONE = b"data: [DONE]\n\n"
PADDING = "abdefghijklmnoprstuvxyz1234567890"  # as observed, over and over
LONGEST_PADDING = 50
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
    """Answer in one piece.

    Parameters
    ----------
    generation : Generation
        What was generated.
    request : Request
        What it was generated for.

    Returns
    -------
    dict
        ``response``, ``tool_calls`` where the answer is calls of declared tools (and the response is empty), ``usage``.

    Raises
    ------
    AiError
        5024, if JSON was asked for and the answer is none.
    """
    counts = {"usage": _usage(generation.usage)}
    if calls := tool_calls(generation.text, request):
        return {"response": "", "tool_calls": calls, **counts}
    text = generation.text
    if request.answer_schema is not None:
        text = read_json(text, request.answer_schema)
    return {"response": text, **counts}


class Chunks:
    """Chunks of one stream, made event by event.

    Parameters
    ----------
    request : Request
        What is answered.

    Notes
    -----
    Where tools are declared, text that may turn out as a call is held back until it is certain.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._held = ""
        self._may_be_call = bool(request.tools)

    def feed(self, event: Event) -> list[dict[str, Any]]:
        """Take the next token.

        Parameters
        ----------
        event : Event
            Of this request's row.

        Returns
        -------
        list of dict
            Chunks that are due: none for a token without text; with the last token, the counts too.
        """
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
    """Chunks of a stream.

    Parameters
    ----------
    events : iterable of Event
        One a token.
    request : Request
        What is answered.

    Yields
    ------
    dict
        ``response`` each, one with ``tool_calls`` where the answer is calls, the last with ``usage``.
    """
    stream = Chunks(request)
    for event in events:
        yield from stream.feed(event)


def sse(chunk: Mapping[str, Any], *, pad: bool = False) -> bytes:
    r"""Bytes of one event.

    Parameters
    ----------
    chunk : mapping
        From `chunks`.
    pad : bool
        Add a field ``p`` of random length.

    Returns
    -------
    bytes
        For example ``data: {"response":"New"}\n\n``.
    """
    if pad:
        length = 1 + secrets.randbelow(LONGEST_PADDING)
        chunk = {**chunk, "p": (PADDING * 2)[:length]}
    return b"data: " + to_json(chunk) + b"\n\n"


def to_json(value: Any) -> bytes:
    """Compact JSON as the service writes it.

    Parameters
    ----------
    value : object
        What `json.dumps` takes.

    Returns
    -------
    bytes
        UTF-8, escaped where it must be: half a surrogate pair, which error messages may quote, has no UTF-8.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def tool_calls(text: str, request: Request) -> list[dict[str, Any]]:
    """Calls of declared tools in an answer.

    Parameters
    ----------
    text : str
        The whole answer.
    request : Request
        What it answers.

    Returns
    -------
    list of dict
        ``{"name", "arguments"}`` each; none where the answer is plain text, or a malformed call, which is left as text.
    """
    try:
        return parse_calls(text, request.tools)
    except ToolCallError:
        return []


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
