"""JSON mode: an instruction in the prompt, and an answer that is refused unless it fits the schema asked for.

A schema may use the keywords of `ANSWER_SCHEMAS` and no others. Schemas come from strangers: without regular
expressions and references, the work is bounded by the size of the schema times that of the answer. A request with
another keyword is refused before anything is generated, so no answer passes unchecked.

References
----------
https://developers.cloudflare.com/workers-ai/features/json-mode/
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from refgemma.errors import InputError
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.schema import OWN_WORDING, Schema, join, loads, problems

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
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)


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


def _not_json(given: Mapping[str, Any]) -> list[str]:
    """Return a problem where a schema from Python holds what JSON cannot: a set, a date, NaN."""
    try:
        json.dumps(given["json_schema"], allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return [f"'/response_format/json_schema' cannot be written as JSON: {error}"]
    return []
