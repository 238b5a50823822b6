"""A small interpreter of JSON Schema: what is wrong with a value, in the words of the service.

It knows the keywords of the two model pages and those that schemas for short JSON answers use, all of them with the
meaning of draft 2020-12. Regular expressions and references are left out on purpose: schemas come from strangers, and
without the two the work is bounded by the size of the schema times that of the value.

The service's wording is known from what users report; where no report was found, ours is modelled on its neighbours::

    oneOf at '/' not met, 0 matches: required properties at '/' are 'prompt', Type mismatch of ...
    Type mismatch of '/messages/0/content', 'array' not in 'string'
    required properties at '/messages/1' are 'role,content'
    Length of '/prompt' must be <= 2048
    '/top_k' must be <= 50
    Additional or unevaluated properties '/seed' at '/' not allowed

References
----------
https://json-schema.org/draft/2020-12/json-schema-validation
"""

from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

Schema: TypeAlias = Mapping[str, Any]

LONGEST = 200  # characters of a name or a value that is quoted
SHOWN = 20  # problems in one message; a request may have a million, and no more are looked for than are shown

TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "number": lambda value: _is_number(value),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}

# What a number or a length must be; said as what must hold, and not as what must not, so that NaN is within no bounds.
BOUNDS = {
    "minimum": (">=", operator.ge),
    "maximum": ("<=", operator.le),
    "exclusiveMinimum": (">", operator.gt),
    "exclusiveMaximum": ("<", operator.lt),
}
LENGTHS: dict[str, tuple[type[str] | type[list[Any]], str, Callable[[Any, Any], bool]]] = {
    "minLength": (str, ">=", operator.ge),
    "maxLength": (str, "<=", operator.le),
    "minItems": (list, ">=", operator.ge),
    "maxItems": (list, "<=", operator.le),
}
NESTED = ("oneOf", "anyOf", "allOf")
OBJECTS = ("properties", "required", "additionalProperties")
KEYWORDS = frozenset({"type", "enum", "const", "items", *OBJECTS, *NESTED, *BOUNDS, *LENGTHS})
# These say something about a value and demand nothing.
ANNOTATIONS = frozenset({"title", "description", "default", "examples", "format", "deprecated", "$schema", "$comment"})


def problems(value: Any, schema: Schema, at: str = "/") -> list[str]:
    """What is wrong with a value."""
    return first(_problems(value, schema, at))


def first(found: Iterable[str]) -> list[str]:
    """As many problems as `join` has use for."""
    return list(itertools.islice(found, SHOWN + 1))


def join(found: list[str]) -> str:
    """One sentence of several problems."""
    more = ["and more"] if len(found) > SHOWN else []
    return ", ".join(found[:SHOWN] + more)


def _problems(value: Any, schema: Schema, at: str) -> Iterator[str]:
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(TYPES[name](value) for name in types):
            given, wanted = f"'{type_name(value)}'", ",".join(f"'{name}'" for name in types)
            if value is None:  # which the service reports the other way round
                given, wanted = wanted, given
            yield f"Type mismatch of '{at}', {given} not in {wanted}"
            return
    if "const" in schema and not _same(value, schema["const"]):
        yield f"'{at}' must be {short(_written(schema['const']))}"
    if "enum" in schema and not any(_same(value, allowed) for allowed in schema["enum"]):
        yield f"'{at}' must be one of {short(', '.join(map(_written, schema['enum'][:LONGEST])))}"
    if _is_number(value):
        for keyword, (sign, holds) in BOUNDS.items():
            if keyword in schema and not holds(value, schema[keyword]):
                yield f"'{at}' must be {sign} {_written(schema[keyword])}"
    for keyword, (kind, sign, holds) in LENGTHS.items():
        if keyword in schema and isinstance(value, kind) and not holds(len(value), schema[keyword]):
            yield f"Length of '{at}' must be {sign} {_written(schema[keyword])}"
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from _problems(item, schema["items"], below(at, index))
    if isinstance(value, dict):
        yield from _object_problems(value, schema, at)
    yield from _nested_problems(value, schema, at)


def _object_problems(value: dict[str, Any], schema: Schema, at: str) -> Iterator[str]:
    bad_nulls = set()
    properties = schema.get("properties", {})
    for name, inner in properties.items():
        if name in value:
            found = problems(value[name], inner, below(at, name))
            if found and value[name] is None:
                bad_nulls.add(name)
            yield from found
    others = schema.get("additionalProperties", True)
    for name in value:
        if name in properties or others is True:
            continue
        if others is False:
            yield f"Additional or unevaluated properties '{below(at, name)}' at '{at}' not allowed"
        else:
            yield from _problems(value[name], others, below(at, name))
    required = schema.get("required", [])
    # The service counts a null among the missing, once more to its wrong type.
    if any(name not in value or name in bad_nulls for name in required):
        yield f"required properties at '{at}' are '{short(','.join(required))}'"


def _nested_problems(value: Any, schema: Schema, at: str) -> Iterator[str]:
    for inner in schema.get("allOf", []):
        yield from _problems(value, inner, at)
    for keyword in ("oneOf", "anyOf"):
        if keyword not in schema:
            continue
        branches = [problems(value, inner, at) for inner in schema[keyword]]
        matches = branches.count([])
        if matches == 0:
            # What is wrong in every branch is said once.
            found = list(dict.fromkeys(text for texts in branches for text in texts))
            yield f"{keyword} at '{at}' not met, 0 matches: {join(found)}"
        elif matches > 1 and keyword == "oneOf":
            yield f"oneOf at '{at}' not met, {matches} matches"


def short(text: str) -> str:
    """What fits a message: names and values may be as long as the request."""
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def type_name(value: Any) -> str:
    """Name of a value's JSON type."""
    names = [name for name, holds in TYPES.items() if name != "integer" and holds(value)]
    return names[0] if names else type(value).__name__


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(a: Any, b: Any) -> bool:
    """Equality as JSON has it: 1 is 1.0, and neither is true."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return type_name(a) == type_name(b) and bool(a == b)


def below(at: str, name: str | int) -> str:
    """JSON pointer to what lies inside a value.

    https://www.rfc-editor.org/rfc/rfc6901
    """
    escaped = short(str(name)).replace("~", "~0").replace("/", "~1")
    return f"{at.rstrip('/')}/{escaped}"


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
