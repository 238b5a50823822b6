"""JSON mode: an instruction in the prompt, and an answer that is refused unless it is what was asked for.

The answer is checked with `refgemma.workers_ai.schema`. A request whose schema uses a keyword that is not known there
is refused before anything is generated: no answer counts as checked that was not.

References
----------
https://developers.cloudflare.com/workers-ai/features/json-mode/
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from refgemma.workers_ai import strict_json
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.schema import (
    ANNOTATIONS,
    BOUNDS,
    KEYWORDS,
    LENGTHS,
    NESTED,
    TYPES,
    Schema,
    below,
    first,
    join,
    problems,
    type_name,
)

ANY_OBJECT: Schema = {"type": "object"}
INSTRUCTION = "Answer with one JSON object and nothing else."
INSTRUCTION_WITH_SCHEMA = "Answer with JSON and nothing else. It must fit this JSON Schema:\n{schema}"

_FORMAT = {
    "type": "object",
    "properties": {"type": {"enum": ["json_object", "json_schema"]}, "json_schema": {"type": "object"}},
    "required": ["type"],
}
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)


def check_format(given: Any) -> None:
    """Check a ``response_format``."""
    found = problems(given, _FORMAT, "/response_format")
    if not found and given["type"] == "json_schema":
        if "json_schema" not in given:
            found = ["required properties at '/response_format' are 'type,json_schema'"]
        else:
            found = first(_schema_problems(given["json_schema"], "/response_format/json_schema")) or _not_json(given)
    if found:
        raise AiError(5006, join(found))


def answer_schema(given: Mapping[str, Any]) -> Schema:
    """Schema that answers must fit."""
    return given["json_schema"] if given["type"] == "json_schema" else ANY_OBJECT


def instruction(schema: Schema) -> str:
    """What the model is told."""
    if schema is ANY_OBJECT:
        return INSTRUCTION
    return INSTRUCTION_WITH_SCHEMA.format(schema=json.dumps(schema, ensure_ascii=False))


def read_json(text: str, schema: Schema) -> str:
    """Take the JSON out of an answer."""
    text = text.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1].strip()
    try:
        value = strict_json.read(text)
    except ValueError:
        raise AiError(5024, f"JSON Mode couldn't be met: the answer is no JSON, it begins {text[:60]!r}") from None
    if found := problems(value, schema):
        raise AiError(5024, f"JSON Mode couldn't be met: {join(found)}")
    return text


def _not_json(given: Mapping[str, Any]) -> list[str]:
    """A sentence where a schema from Python holds what JSON cannot: a set, a date, NaN."""
    try:
        json.dumps(given["json_schema"], allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return [f"'/response_format/json_schema' cannot be written as JSON: {error}"]
    return []


def _schema_problems(schema: Any, at: str) -> Iterator[str]:
    """What `problems` could not work with."""
    if not isinstance(schema, dict):
        yield f"Type mismatch of '{at}', '{type_name(schema)}' not in 'object'"
        return
    for keyword, value in schema.items():
        here = below(at, keyword)
        if keyword in ANNOTATIONS:
            continue
        if keyword not in KEYWORDS:
            yield f"'{here}' is a keyword that answers are not checked for: leave it out"
        elif keyword in NESTED:
            if not isinstance(value, list) or not value:
                yield f"'{here}' must be a list of schemas"
            else:
                for index, one in enumerate(value):
                    yield from _schema_problems(one, below(here, index))
        elif keyword == "properties":
            if not isinstance(value, dict):
                yield f"'{here}' must be an object of schemas"
            else:
                for name, one in value.items():
                    yield from _schema_problems(one, below(here, name))
        elif keyword == "items" or (keyword == "additionalProperties" and not isinstance(value, bool)):
            yield from _schema_problems(value, here)
        elif not _fits(keyword, value):
            yield f"'{here}' has a value that JSON Schema does not allow"


def _fits(keyword: str, value: Any) -> bool:
    """Whether a keyword that holds no schema has a value it can have."""
    match keyword:
        case "type":
            names = value if isinstance(value, list) else [value]
            return bool(names) and all(isinstance(name, str) and name in TYPES for name in names)
        case "required":
            return isinstance(value, list) and all(isinstance(name, str) for name in value)
        case "enum":
            return isinstance(value, list) and bool(value)
        case keyword if keyword in BOUNDS:
            return TYPES["number"](value)
        case keyword if keyword in LENGTHS:
            return TYPES["integer"](value) and value >= 0
    return True
