"""Read JSON strictly, and validate it by JSON Schema (draft 2020-12, package `jsonschema`) in the service's own words.

`WORDING` has one template for each keyword. The service's wording is known from what users reported; for keywords
without a report it follows the same pattern::

    oneOf at '/' not met, 0 matches: required properties at '/' are 'prompt', Type mismatch of ...
    Type mismatch of '/messages/0/content', 'array' not in 'string'
    required properties at '/messages/1' are 'role,content'
    Length of '/prompt' must be <= 2048
    '/top_k' must be <= 50

References
----------
https://json-schema.org/draft/2020-12/json-schema-validation and https://www.rfc-editor.org/rfc/rfc8259
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, NoReturn, TypeAlias

from refgemma.errors import InputError

Schema: TypeAlias = Mapping[str, Any]

LONGEST = 200  # characters of a quoted name or value
SHOWN = 20  # problems in one message; validation stops soon after, since a request may have a million

BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}
WORDING = {
    "type": "Type mismatch of '{at}', {given} not in {wanted}",
    "const": "'{at}' must be {limit}",
    "enum": "'{at}' must be one of {limit}",
    "minimum": "'{at}' must be >= {limit}",
    "maximum": "'{at}' must be <= {limit}",
    "exclusiveMinimum": "'{at}' must be > {limit}",
    "exclusiveMaximum": "'{at}' must be < {limit}",
    **dict.fromkeys(("minLength", "minItems"), "Length of '{at}' must be >= {limit}"),
    **dict.fromkeys(("maxLength", "maxItems"), "Length of '{at}' must be <= {limit}"),
    "required": "required properties at '{at}' are '{limit}'",
    "additionalProperties": "Additional or unevaluated properties '{name}' at '{at}' not allowed",
    **{keyword: keyword + " at '{at}' not met, {matches} matches{problems}" for keyword in ("oneOf", "anyOf")},
}
OWN_WORDING = "x-wording"  # key of a schema whose problems have other templates


def problems(value: Any, schema: Schema, at: str = "/") -> list[str]:
    """Return one sentence for each problem of a value, at most one more than `join` shows."""
    errors = validator_class()(schema).iter_errors(value)
    return list(islice(_distinct(_sentences(errors, at)), SHOWN + 1))


def join(found: list[str]) -> str:
    """Join several problems into one sentence."""
    return ", ".join(found[:SHOWN] + ["and more"] * (len(found) > SHOWN))


@functools.cache
def validator_class() -> Any:
    """Return jsonschema's validator, except that NaN is within no bounds, and that it stops at the first problems."""
    try:
        from jsonschema import Draft202012Validator, ValidationError
        from jsonschema.validators import extend
    except ModuleNotFoundError as error:
        why = f"validating requests needs {error.name}, which is not installed"
        raise InputError(f'{why}: pip install "refgemma[serve]"') from None

    def bound(holds: Callable[[Any, Any], bool]) -> Any:
        def check(validator: Any, limit: Any, value: Any, schema: Schema) -> Iterator[Any]:
            if validator.is_type(value, "number") and not holds(value, limit):
                yield ValidationError("")

        return check

    def required(validator: Any, names: list[str], value: Any, schema: Schema) -> Iterator[Any]:
        if not isinstance(value, dict):
            return
        properties = schema.get("properties", {})
        for name in names:
            # The service reports a null of the wrong type as missing, in addition to its type.
            is_null = name in value and value[name] is None
            if name not in value or (is_null and not validator.evolve(schema=properties.get(name, {})).is_valid(None)):
                yield ValidationError("")
                return

    def some_of(most: float) -> Any:
        def check(validator: Any, branches: list[Schema], value: Any, schema: Schema) -> Iterator[Any]:
            found = [list(islice(validator.descend(value, branch), SHOWN + 1)) for branch in branches]
            matches = found.count([])
            if not 1 <= matches <= most:
                yield ValidationError(str(matches), context=[] if matches else list(chain(*found)))

        return check

    keywords = {name: bound(holds) for name, holds in BOUNDS.items()}
    keywords |= {"required": required, "oneOf": some_of(1), "anyOf": some_of(float("inf"))}
    made = extend(Draft202012Validator, keywords)
    evolve = made.evolve

    def in_this_draft(validator: Any, **changes: Any) -> Any:
        # jsonschema would switch to the draft that an inner `$schema` names: other keywords, some of them unchecked.
        schema = changes.get("schema")
        if isinstance(schema, dict) and "$schema" in schema:
            changes["schema"] = {name: value for name, value in schema.items() if name != "$schema"}
        return evolve(validator, **changes)

    made.evolve = in_this_draft
    return made


def _sentences(errors: Iterable[Any], at: str) -> Iterator[str]:
    """Word jsonschema's errors; of a value that has the wrong type, its type only."""
    wrong_type = None
    for error in errors:
        node = (error.absolute_path, id(error.schema))
        if node == wrong_type:
            continue
        if error.validator == "type":
            wrong_type = node
        here = functools.reduce(below, error.absolute_path, at)
        template = error.schema.get(OWN_WORDING, WORDING).get(error.validator, WORDING.get(error.validator))
        if error.validator == "additionalProperties":
            for name in error.instance:
                if name not in error.schema.get("properties", {}):
                    yield template.format(at=here, name=below(here, name))
        else:
            yield template.format(at=here, **_details(error, at))


def _details(error: Any, at: str) -> dict[str, str]:
    value, limit = error.instance, error.validator_value
    match error.validator:
        case "type":
            given = f"'{type_name(value)}'"
            wanted = ",".join(f"'{name}'" for name in (limit if isinstance(limit, list) else [limit]))
            # The service swaps the two for null.
            return {"given": wanted, "wanted": given} if value is None else {"given": given, "wanted": wanted}
        case "required":
            return {"limit": short(",".join(limit))}
        case "enum":
            return {"limit": short(", ".join(map(_written, limit[:LONGEST])))}
        case "oneOf" | "anyOf":
            inner = list(_distinct(_sentences(error.context, at)))
            return {"matches": error.message, "problems": f": {join(inner)}" if inner else ""}
    return {"limit": short(_written(limit))}


def _distinct(sentences: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for sentence in sentences:
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


def short(text: str) -> str:
    """Cut a text to what fits a message: names and values may be as long as the request."""
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def type_name(value: Any) -> str:
    """Return the name of a value's JSON type, of other values that of their Python type."""
    names = {
        type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array",
        dict: "object",
    }  # fmt: skip
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)


def below(at: str, name: str | int) -> str:
    """Extend a JSON pointer (https://www.rfc-editor.org/rfc/rfc6901) by a name or an index."""
    escaped = short(str(name)).replace("~", "~0").replace("/", "~1")
    return f"{at.rstrip('/')}/{escaped}"


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def loads(text: str) -> Any:
    """Parse JSON as its standard defines it, which is less than Python's parser accepts."""
    if text.startswith("\N{BYTE ORDER MARK}"):
        raise InputError("it begins with a byte order mark")
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise InputError("it is nested too deep") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except InputError:
        raise
    except ValueError:  # the only other one: the interpreter's limit on the digits of an integer
        raise InputError("it has a whole number with too many digits") from None


def _refuse_constant(word: str) -> NoReturn:
    raise InputError(f"{word} is not JSON")
