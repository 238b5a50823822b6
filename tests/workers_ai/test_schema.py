"""Values are accepted and refused as jsonschema does by itself, and problems are worded as the service was seen to."""

import copy
import json
from collections import Counter
from random import Random

import jsonschema
import pytest

from refgemma.workers_ai.pages import HOSTED, page
from refgemma.workers_ai.prompt import check_format
from refgemma.workers_ai.schema import LONGEST, SHOWN, join, problems
from tests.workers_ai.keyword_cases import cases

VALUES = [None, True, False, 0, 1, 5.0, 0.5, -1, 51, 1e300, "", "x", "true", [], [1], ["x"], {}, {"type": "x"}]


def nodes(value, path=()):
    """Paths to a value and to all inside it."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in children:
        yield from nodes(inner, (*path, key))


def changed(rng, request, values=VALUES):
    """A request with one node replaced, removed or doubled."""
    request = copy.deepcopy(request)
    *_, path = rng.sample(list(nodes(request)), 1)
    if not path:
        return rng.choice(values)
    parent = request
    for key in path[:-1]:
        parent = parent[key]
    match rng.randrange(4):
        case 0:
            del parent[path[-1]]
        case 1 if isinstance(parent, dict):
            parent[rng.choice([*parent, "name", "type", "prompt", "messages", "a\nb"])] = parent[path[-1]]
        case _:
            parent[path[-1]] = rng.choice(values)
    return request


@pytest.mark.parametrize("model", HOSTED)
def test_requests_are_judged_as_jsonschema_judges_them(model):
    rng = Random(model)
    validator = jsonschema.Draft202012Validator(page(model).schema)
    short = [good for place, good, _ in cases(model) if "maxLength" not in place]
    verdicts = Counter()
    for _ in range(1500):
        request = rng.choice(short) | rng.choice([{}, rng.choice(short)])
        for _ in range(rng.randrange(3)):
            request = changed(rng, request)
        accepted = validator.is_valid(request)
        assert (problems(request, page(model).schema) == []) == accepted, request
        verdicts[accepted] += 1
    assert min(verdicts.values()) > 300  # neither verdict is the answer to everything


def random_schema(rng, depth=0):
    """A schema of the keywords that answers may be checked for."""
    schema = {}
    kinds = ["null", "boolean", "integer", "number", "string", "array", "object"]
    if rng.random() < 0.6:
        schema["type"] = rng.choice(kinds) if rng.random() < 0.8 else rng.sample(kinds, 2)
    for keyword, values in (
        ("enum", [[1, "x"], [True], [None, 0.5], [[1], {"a": 1}]]),
        ("const", [1, 0, False, "x", [True], {"a": 1.0}]),
        ("minimum", [0, 0.5, 2]),
        ("maximum", [0, 1, 5]),
        ("exclusiveMinimum", [0, 1]),
        ("exclusiveMaximum", [1, 5]),
        ("minLength", [0, 1, 2]),
        ("maxLength", [0, 1, 2.0]),
        ("minItems", [0, 1, 2]),
        ("maxItems", [0, 1]),
        ("required", [["a"], ["a", "b"], []]),
    ):
        if rng.random() < 0.1:
            schema[keyword] = rng.choice(values)
    if depth < 2:
        for keyword in ("oneOf", "anyOf", "allOf"):
            if rng.random() < 0.15:
                schema[keyword] = [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 3))]
        if rng.random() < 0.3:
            schema["items"] = random_schema(rng, depth + 1)
        if rng.random() < 0.4:
            schema["properties"] = {name: random_schema(rng, depth + 1) for name in rng.sample("abc", 2)}
        if rng.random() < 0.2:
            schema["additionalProperties"] = rng.choice([True, False, random_schema(rng, depth + 1)])
    return schema


def random_value(rng, depth=0):
    """Any JSON, small."""
    if depth < 2 and rng.random() < 0.5:
        if rng.random() < 0.3:
            return [random_value(rng, depth + 1) for _ in range(rng.randrange(3))]
        return {name: random_value(rng, depth + 1) for name in rng.sample("abc", rng.randrange(4))}
    return rng.choice([None, True, False, 0, 1, 1.0, 0.5, 3, -1, "", "x", "🌧", "long"])


def test_answers_are_judged_as_jsonschema_judges_them():
    rng = Random(7)
    verdicts = Counter()
    for _ in range(3000):
        schema, value = random_schema(rng), random_value(rng)
        check_format({"type": "json_schema", "json_schema": schema})  # the generator makes nothing that is refused
        accepted = jsonschema.Draft202012Validator(schema).is_valid(value)
        assert (problems(value, schema) == []) == accepted, (schema, value)
        verdicts[accepted] += 1
    assert min(verdicts.values()) > 500


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        # What users of the service reported, to the letter.
        (
            {},
            "oneOf at '/' not met, 0 matches: required properties at '/' are 'prompt', "
            "required properties at '/' are 'messages'",
        ),
        (
            {"messages": [{"role": "user", "content": ["x"]}, {"role": "assistant", "content": None}]},
            "oneOf at '/' not met, 0 matches: required properties at '/' are 'prompt', "
            "Type mismatch of '/messages/0/content', 'array' not in 'string', "
            "Type mismatch of '/messages/1/content', 'string' not in 'null', "
            "required properties at '/messages/1' are 'role,content'",
        ),
        # Ours, on the same pattern.
        ([], "Type mismatch of '/', 'array' not in 'object'"),
        (
            {"prompt": "x", "top_k": 51},
            "oneOf at '/' not met, 0 matches: '/top_k' must be <= 50, required properties at '/' are 'messages'",
        ),
        ({"prompt": "x", "messages": []}, "oneOf at '/' not met, 2 matches"),
    ],
)
def test_the_wording_is_that_of_the_service(inputs, text):
    assert join(problems(inputs, page(HOSTED[0]).schema)) == text


@pytest.mark.parametrize(
    ("value", "schema", "text"),
    [
        ("x" * 2049, {"maxLength": 2048}, "Length of '/prompt' must be <= 2048"),  # observed
        (51, {"maximum": 50}, "'/prompt' must be <= 50"),  # observed, of another field
        (0, {"minimum": 1}, "'/prompt' must be >= 1"),
        (1, {"exclusiveMinimum": 1}, "'/prompt' must be > 1"),
        ("b", {"enum": ["a", 1]}, "'/prompt' must be one of \"a\", 1"),
        ("b", {"const": None}, "'/prompt' must be null"),
        (5, {"type": ["array", "null"]}, "Type mismatch of '/prompt', 'number' not in 'array','null'"),
        ({1}, {"type": "object"}, "Type mismatch of '/prompt', 'set' not in 'object'"),
        (
            {"seed": 1},
            {"additionalProperties": False},
            "Additional or unevaluated properties '/prompt/seed' at '/prompt' not allowed",
        ),
        ({"a/b~": 1}, {"additionalProperties": {"const": 2}}, "'/prompt/a~1b~0' must be 2"),
        (5, {"anyOf": [{"const": 1}]}, "anyOf at '/prompt' not met, 0 matches: '/prompt' must be 1"),
    ],
)
def test_each_problem_is_one_sentence(value, schema, text):
    assert problems(value, schema, "/prompt") == [text]


def test_true_is_not_a_number_and_one_is_not_true():
    assert problems(True, {"type": "integer"})
    assert problems(True, {"type": "number"})
    assert problems(1, {"const": True})
    assert problems([1], {"enum": [[True]]})
    assert not problems(1.0, {"type": "integer", "const": 1})
    assert problems(float("inf"), {"type": "integer"})


def test_lengths_count_code_points():
    rain = "🌧"  # one code point, two units of UTF-16, four bytes
    assert not problems(rain, {"maxLength": 1})
    assert problems(rain * 2, {"maxLength": 1})
    assert problems("e\N{COMBINING ACUTE ACCENT}", {"maxLength": 1})  # one character to the eye, two code points


def test_messages_stay_short_however_much_is_wrong():
    inputs = {"messages": [[]] * 10_000, "n" * 10_000: 1}
    text = join(problems(inputs, page(HOSTED[0]).schema))
    assert len(text) < 100 * SHOWN
    assert "more" in text
    (text,) = problems({"n" * 10_000: 1}, {"additionalProperties": {"enum": ["v" * 10_000]}})
    assert len(text) < 3 * LONGEST
    assert json.dumps(text)
