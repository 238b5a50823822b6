"""From a request to the model's prompt: system texts, tools, tool results and JSON mode become turns of text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from refgemma.errors import InputError
from refgemma.gemma import Gemma
from refgemma.text.tools import to_turns
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.json_mode import instruction
from refgemma.workers_ai.schema import Schema, join, problems

Message = Mapping[str, Any]

_CALL = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "arguments": {"type": ["object", "string"]}},
    "required": ["name", "arguments"],
}
_WRAPPED_CALL = {"type": "object", "properties": {"function": _CALL}, "required": ["function"]}
_TOKEN = re.compile(
    r'"(?:[^"\\]|\\.)*"|[,:]|[^\s",:]+'
)  # of JSON: a string, a separator, or anything else except space
_SPACES = {",": ", ", ":": ": "}
_CALLS = {"type": "array", "items": {"anyOf": [_CALL, _WRAPPED_CALL]}}


def encode(
    gemma: Gemma,
    messages: Sequence[Message],
    *,
    raw: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    answer_schema: Schema | None = None,
) -> list[int]:
    """Encode a prompt."""
    try:
        if raw is not None:
            return gemma.encode_prompt(raw, raw=True)
        return gemma.encode_prompt(turns(messages, tools=tools, answer_schema=answer_schema))
    except InputError as error:
        raise AiError(5006, f"no prompt can be made of this: {error}") from None


def turns(
    messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), answer_schema: Schema | None = None
) -> list[dict[str, str]]:
    """Translate messages into those that the chat template accepts."""
    plain = [_with_calls(messages, index) for index in range(len(messages))]
    if answer_schema is not None:
        systems = next((i for i, message in enumerate(plain) if message["role"] != "system"), len(plain))
        plain.insert(systems, {"role": "system", "content": instruction(answer_schema)})
    return to_turns(plain, tools)


def _with_calls(messages: Sequence[Message], index: int) -> dict[str, Any]:
    """Reduce a message to role, content and the model's calls, which are in their field or in the text as JSON.

    Cloudflare's own `ai-utils` reports a call as text before the result that follows it.
    """
    message = messages[index]
    plain = {"role": message["role"], "content": message["content"]}
    if message["role"] == "tool":
        return plain | {"content": _spaced(plain["content"])}
    if message["role"] not in ("assistant", "model"):
        return plain
    calls = message.get("tool_calls")
    if calls:
        if found := problems(calls, _CALLS, f"/messages/{index}/tool_calls"):
            raise AiError(5006, join(found))
        return plain | {"tool_calls": list(map(_flat, calls))}
    if index + 1 < len(messages) and messages[index + 1]["role"] == "tool" and (calls := _read_calls(plain["content"])):
        return plain | {"tool_calls": list(map(_flat, calls))}
    return plain


def _spaced(text: str) -> str:
    """Space a tool's result as Python writes JSON, as models were trained on; text that is not JSON is unchanged.

    Only the space between tokens changes: numbers, escapes and duplicate keys remain as the tool wrote them.
    """
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return "".join(_SPACES.get(token, token) for token in _TOKEN.findall(text))


def _flat(call: dict[str, Any]) -> dict[str, Any]:
    """Return only the name and the arguments of a call in either form."""
    body = call["function"] if problems(call, _CALL) else call
    return {"name": body["name"], "arguments": body["arguments"]}


def _read_calls(text: str) -> list[Any]:
    """Return the calls if the text is JSON of calls and nothing else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = value if isinstance(value, list) else [value]
    return [] if problems(calls, _CALLS) else calls
