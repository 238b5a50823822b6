"""The list of models, and their schemas."""

import pytest

from refgemma.workers_ai.pages import GEMMA_2B, GEMMA_7B, page
from tests.workers_ai.server.live import ACCOUNT, ask

SEARCH = f"{ACCOUNT}/models/search"


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", [GEMMA_2B, GEMMA_7B]),
        ("?search=7B", [GEMMA_7B]),
        ("?search=llama", []),
        ("?author=google&task=Text%20Generation&hide_experimental=true", [GEMMA_2B, GEMMA_7B]),
        ("?author=meta", []),
        ("?task=Translation", []),
        ("?source=2", []),
        ("?per_page=1", [GEMMA_2B]),
        ("?per_page=1&page=2", [GEMMA_7B]),
        ("?page=3", []),
    ],
)
def test_models_are_found(address, query, names):
    reply = ask(address, SEARCH + query)
    assert [model["name"] for model in reply.result] == names
    assert reply.json["result_info"]["count"] == len(names)


def test_a_page_has_an_end(address):
    assert ask(address, f"{SEARCH}?per_page=1000").json["result_info"]["per_page"] == 100


def test_a_model_tells_its_context_and_what_answers(address):
    properties = [{p["property_id"]: p["value"] for p in model["properties"]} for model in ask(address, SEARCH).result]
    assert [p["context_window"] for p in properties] == ["8192", "3500"]
    assert "stand-in" in ask(address, SEARCH).result[0]["description"]


@pytest.mark.parametrize("query", ["page=0", "per_page=x", "page=-1", "page=99999999999", "page=%C2%B2"])
def test_pages_count_from_one(address, query):
    assert ask(address, f"{SEARCH}?{query}").code == 5006


def test_the_schema_is_the_pages_own(address):
    assert ask(address, f"{ACCOUNT}/models/schema?model={GEMMA_7B}").result["input"] == page(GEMMA_7B).schema
    assert (
        ask(address, f"{ACCOUNT}/models/schema?model=x").code == ask(address, f"{ACCOUNT}/models/schema").code == 5007
    )
