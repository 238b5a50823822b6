"""From a request to the model's prompt: system texts, tools, tool results and JSON mode become turns of text.

An answer's schema may use the keywords of `ANSWER_SCHEMAS` and no others. Schemas come from strangers: without regular
expressions and references, the work is bounded by the size of the schema times that of the answer. A request with
another keyword is refused before anything is generated, so no answer passes unchecked.

References
----------
https://developers.cloudflare.com/workers-ai/features/json-mode/
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from refgemma.errors import InputError
from refgemma.gemma import Gemma
from refgemma.text.tools import to_turns
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.schema import OWN_WORDING, Schema, join, problems

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


ANY_OBJECT: Schema = {"type": "object"}
INSTRUCTION = "Answer with one JSON object and nothing else."
INSTRUCTION_WITH_SCHEMA = "Answer with JSON and nothing else. It must fit this JSON Schema:\n{schema}"

ANNOTATIONS = ("title", "description", "default", "examples", "format", "deprecated", "$schema", "$comment")
_NOT_ALLOWED = "'{at}' has a value that JSON Schema does not allow"
_TYPES = {"enum": ["null", "boolean", "integer", "number", "string", "array", "object"]}


def _keyword(must: str, **schema: Any) -> dict[str, Any]:
    """Make the schema of a keyword's value, with one sentence for whatever is wrong with it."""
    return {**schema, OWN_WORDING: dict.fromkeys(schema, must)}


_BY_NAME = _keyword("'{at}' must be an object of schemas", type="object", additionalProperties={"$ref": "#"})
_SCHEMAS = _keyword("'{at}' must be a list of schemas", type="array", minItems=1, items={"$ref": "#"})
_LENGTH = _keyword(_NOT_ALLOWED, type="integer", minimum=0)
_BOUND = _keyword(_NOT_ALLOWED, type="number")
ANSWER_SCHEMAS: Schema = {  # the schema of the schemas that answers can be checked by
    "type": "object",
    "properties": {
        **{name: {} for name in ANNOTATIONS},
        "type": _keyword(_NOT_ALLOWED, anyOf=[_TYPES, {"type": "array", "items": _TYPES, "minItems": 1}]),
        "const": {},
        "enum": _keyword(_NOT_ALLOWED, type="array", minItems=1),
        **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _BOUND),
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _LENGTH),
        "required": _keyword(_NOT_ALLOWED, type="array", items={"type": "string"}),
        "properties": _BY_NAME,
        "additionalProperties": {"if": {"type": "boolean"}, "else": {"$ref": "#"}},
        "items": {"$ref": "#"},
        **dict.fromkeys(("oneOf", "anyOf", "allOf"), _SCHEMAS),
    },
    "additionalProperties": False,
    OWN_WORDING: {"additionalProperties": "'{name}' is a keyword that answers are not checked for: leave it out"},
}
_FORMAT = {
    "type": "object",
    "properties": {"type": {"enum": ["json_object", "json_schema"]}, "json_schema": {"type": "object"}},
    "required": ["type"],
}


def check_format(given: Any) -> None:
    """Refuse a ``response_format`` that answers cannot be checked by."""
    found = problems(given, _FORMAT, "/response_format")
    if not found and given["type"] == "json_schema":
        if "json_schema" not in given:
            found = ["required properties at '/response_format' are 'type,json_schema'"]
        else:
            found = problems(given["json_schema"], ANSWER_SCHEMAS, "/response_format/json_schema") or _not_json(given)
    if found:
        raise AiError(5006, join(found))


def answer_schema(given: Mapping[str, Any]) -> Schema:
    """Return the schema that answers must fit."""
    return given["json_schema"] if given["type"] == "json_schema" else ANY_OBJECT


def instruction(schema: Schema) -> str:
    """Return the instruction to the model."""
    if schema is ANY_OBJECT:
        return INSTRUCTION
    return INSTRUCTION_WITH_SCHEMA.format(schema=json.dumps(schema, ensure_ascii=False))


def _not_json(given: Mapping[str, Any]) -> list[str]:
    """Return a problem where a schema from Python holds what JSON cannot: a set, a date, NaN."""
    try:
        json.dumps(given["json_schema"], allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return [f"'/response_format/json_schema' cannot be written as JSON: {error}"]
    return []
