"""JSON mode: which formats are taken, and which answers."""

import pytest

from refgemma.workers_ai import AiError, read
from refgemma.workers_ai.answer import read_json
from refgemma.workers_ai.pages import HOSTED
from refgemma.workers_ai.prompt import ANY_OBJECT, INSTRUCTION, instruction

SCHEMA = {
    "title": "Country",
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "languages": {"type": "array", "items": {"enum": ["Nepali", "Hindi"]}, "minItems": 1},
        "population": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
    },
    "required": ["name"],
    "additionalProperties": False,
}


def with_format(given, **fields):
    return {"prompt": "Tell me about Nepal.", "response_format": given} | fields


@pytest.mark.parametrize("model", HOSTED)
def test_formats(model):
    assert read(model, with_format({"type": "json_object"})).answer_schema == {"type": "object"}
    assert read(model, with_format({"type": "json_schema", "json_schema": SCHEMA})).answer_schema == SCHEMA
    assert read(model, {"prompt": "x"}).answer_schema is None


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("json_object", "'/response_format', 'string' not in 'object'"),
        (None, "'/response_format', 'object' not in 'null'"),
        ({}, "required properties at '/response_format' are 'type'"),
        ({"type": "text"}, "'/response_format/type' must be one of"),
        ({"type": "json_schema"}, "'type,json_schema'"),
        ({"type": "json_schema", "json_schema": "x"}, "'string' not in 'object'"),
        ({"type": "json_schema", "json_schema": {"pattern": "(a+)+$"}}, "json_schema/pattern' is a keyword"),
        ({"type": "json_schema", "json_schema": {"properties": {"a": {"$ref": "#"}}}}, "properties/a/.ref' is a keyw"),
        ({"type": "json_schema", "json_schema": {"type": "text"}}, "json_schema/type' has a value"),
        ({"type": "json_schema", "json_schema": {"type": []}}, "json_schema/type' has a value"),
        ({"type": "json_schema", "json_schema": {"required": "name"}}, "json_schema/required' has a value"),
        ({"type": "json_schema", "json_schema": {"minimum": "1"}}, "json_schema/minimum' has a value"),
        ({"type": "json_schema", "json_schema": {"maxItems": -1}}, "json_schema/maxItems' has a value"),
        ({"type": "json_schema", "json_schema": {"enum": []}}, "json_schema/enum' has a value"),
        ({"type": "json_schema", "json_schema": {"anyOf": {}}}, "json_schema/anyOf' must be a list"),
        ({"type": "json_schema", "json_schema": {"oneOf": [5]}}, "json_schema/oneOf/0', 'number' not in 'object'"),
        ({"type": "json_schema", "json_schema": {"properties": []}}, "json_schema/properties' must be an object"),
        ({"type": "json_schema", "json_schema": {"items": []}}, "json_schema/items', 'array' not in 'object'"),
    ],
)
def test_formats_that_no_answer_could_be_checked_for(given, match):
    with pytest.raises(AiError, match=match) as caught:
        read(HOSTED[0], with_format(given))
    assert caught.value.code == 5006


@pytest.mark.parametrize("draft", ["http://json-schema.org/draft-04/schema#", "", 5, [], None])
def test_a_named_draft_changes_nothing(draft):
    schema = {"$schema": draft, "properties": {"a": {"$schema": draft, "const": 1, "exclusiveMinimum": 0}}}
    given = {"type": "json_schema", "json_schema": schema}
    assert read(HOSTED[0], with_format(given)).answer_schema == schema
    assert read_json('{"a": 1}', schema) == '{"a": 1}'
    with pytest.raises(AiError, match="'/a' must be 1"):
        read_json('{"a": 2}', schema)


def test_it_does_not_stream():
    with pytest.raises(AiError, match="JSON mode does not stream"):
        read(HOSTED[0], with_format({"type": "json_object"}, stream=True))
    read(HOSTED[0], with_format({"type": "json_object"}, stream=False))


def test_the_instruction_holds_the_schema():
    assert instruction(ANY_OBJECT) == INSTRUCTION
    assert '"population": {"anyOf"' in instruction(SCHEMA)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Nepal"}',
        ' {"name": "Nepal", "languages": ["Nepali"], "population": null}\n',
        '```json\n{"name": "Nepal"}\n```',
        '```\n{"name": "Nepal"}\n```',
    ],
)
def test_answers_that_fit(text):
    assert read_json(text, SCHEMA).startswith('{"name": "Nepal"')
    assert read_json(text, SCHEMA).endswith("}")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("The capital of Nepal is Kathmandu.", "not JSON, it begins 'The capital"),
        ("", "not JSON"),
        ('{"name": "Nepal"', "not JSON"),
        ('{"name": "Nepal"} Done.', "not JSON"),
        ('{"name": "Nepal", "population": NaN}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "'array' not in 'object'"),
        ("{}", "required properties at '/' are 'name'"),
        ('{"name": "Nepal", "languages": []}', "Length of '/languages' must be >= 1"),
        ('{"name": "Nepal", "languages": ["English"]}', "'/languages/0' must be one of"),
        ('{"name": "Nepal", "population": -1}', "anyOf at '/population' not met"),
        ('{"name": "Nepal", "capital": "Kathmandu"}', "'/capital' at '/' not allowed"),
    ],
)
def test_answers_that_do_not(text, match):
    with pytest.raises(AiError, match=match) as caught:
        read_json(text, SCHEMA)
    assert caught.value.code == 5024
