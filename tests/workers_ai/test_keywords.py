"""Every keyword of both pages' schemas: a request that keeps it passes, one that breaks it alone does not."""

import copy
import json
from importlib import resources

import jsonschema
import pytest

from refgemma.workers_ai import AiError, read
from refgemma.workers_ai.pages import GEMMA_2B, GEMMA_7B, HOSTED, page
from refgemma.workers_ai.prompt import ANNOTATIONS, ANSWER_SCHEMAS
from refgemma.workers_ai.schema import WORDING, problems
from tests.workers_ai.keyword_cases import FORMS, TOOL, cases

CASES = [(model, *case) for model in HOSTED for case in cases(model)]
NAMES = [f"{model.rpartition('/')[2][6:8]}:{place}" for model, place, *_ in CASES]


def keywords(schema, place=""):
    """Places of all keywords that demand something, of ``required`` each name."""
    for keyword, value in schema.items():
        here = f"{place}{keyword}"
        assert keyword in ANSWER_SCHEMAS["properties"]
        assert keyword in {*WORDING, *ANNOTATIONS, "properties", "items"}
        if keyword == "properties":
            for name, inner in value.items():
                yield from keywords(inner, f"{here}/{name}/")
        elif keyword in ("items", "additionalProperties"):
            yield from keywords(value, f"{here}/")
        elif keyword == "required":
            yield from (f"{here}/{name}" for name in value)
        elif keyword not in ANNOTATIONS:
            yield here
        if keyword == "oneOf":
            for index, inner in enumerate(value):
                yield from keywords(inner, f"{here}/{index}/")


@pytest.mark.parametrize("model", HOSTED)
def test_the_table_has_every_keyword(model):
    assert sorted(place for place, *_ in cases(model)) == sorted(keywords(page(model).schema))


@pytest.mark.parametrize(("model", "place", "good", "bad"), CASES, ids=NAMES)
def test_a_keyword_is_enforced(model, place, good, bad):
    schema = page(model).schema
    assert problems(good, schema) == []
    assert problems(bad, schema) != []
    jsonschema.validate(good, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, schema)
    with pytest.raises(AiError, match="5006"):
        read(model, bad)
    if "image" not in place:  # well formed or not, the model has no use for one
        read(model, good)
    if place in ("type", "oneOf/1/properties/tools/items/type"):
        return  # without it, `oneOf` refuses for another reason: a value that is not an object has no missing property
    # Whoever leaves this one keyword out lets the bad request pass.
    relaxed = copy.deepcopy(schema)
    *parents, last = place.split("/")
    inner = relaxed
    for name in parents:
        inner = inner[int(name) if isinstance(inner, list) else name]
    if isinstance(inner, list):
        inner.remove(last)
    else:
        del inner[last]
    assert problems(bad, relaxed) == []


def test_the_pages_differ_as_they_do():
    newer, older = ({form: page(model).fields(form) for form in FORMS} for model in (GEMMA_2B, GEMMA_7B))
    assert newer["messages"].keys() - older["messages"].keys() == {"image", "functions", "tools"}
    assert newer["prompt"].keys() - older["prompt"].keys() == {"image"}
    assert (newer["prompt"]["prompt"]["maxLength"], older["prompt"]["prompt"]["maxLength"]) == (131_072, 6_144)
    assert newer["prompt"]["temperature"].get("default") == 0.6
    assert "default" not in older["prompt"]["temperature"]


def test_fields_that_a_page_does_not_declare_pass():
    read(GEMMA_7B, FORMS["messages"] | {"tools": 5, "functions": 5, "image": 5, "user": "Ada"})
    assert read(GEMMA_7B, FORMS["messages"] | {"tools": [TOOL]}).tools == ()
    read(GEMMA_2B, FORMS["prompt"] | {"tools": 5, "functions": 5})


@pytest.mark.parametrize("model", HOSTED)
def test_the_data_are_the_schemas_of_the_pages(model, shared_json):
    def bare(schema):
        if isinstance(schema, list):
            return [bare(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        prose = {key for key in ("title", "description") if isinstance(schema.get(key), str)}
        return {key: bare(value) for key, value in schema.items() if key not in prose}

    name = model.rpartition("/")[2]
    assert page(model).schema == bare(shared_json(f"workers_ai/schema_{name}_input.json"))
    file = resources.files("refgemma.workers_ai") / "data" / f"{name}.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    assert facts["source"] == f"https://developers.cloudflare.com/workers-ai/models/{name}/"
    assert (facts["model"], facts["context"]) == (model, {GEMMA_2B: 8192, GEMMA_7B: 3500}[model])
