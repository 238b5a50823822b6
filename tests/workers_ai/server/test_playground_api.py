"""The playground's interface: choices, ranges, and answers with the decision behind every token."""

import math
from dataclasses import replace

import pytest

from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.pages import GEMMA_2B, GEMMA_7B
from refgemma.workers_ai.server.app import create_app
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import ask, events, sent, serving, wait_for

INFO, RUN = "/playground/api/info", "/playground/api/run"


def run(address, model=GEMMA_2B, **inputs):
    *shown, done = events(ask(address, RUN, {"model": model, "inputs": {"prompt": "Tell me a story."} | inputs}).body)
    assert done == "[DONE]"
    return [event["token"] for event in shown[:-1]], shown[-1]["result"]


def test_info_tells_models_adapters_and_ranges(address):
    info = ask(address, INFO).json
    assert [model["name"] for model in info["models"]] == [GEMMA_2B, GEMMA_7B]
    assert all(model["stand_in"] for model in info["models"])
    assert "stand-in" in info["notice"]
    assert [lora["name"] for lora in info["loras"]] == ["pirate", "json", "letter"]
    assert all(lora["models"] == [GEMMA_2B, GEMMA_7B] for lora in info["loras"])
    ranges = {p["name"]: (p["type"], p["minimum"], p["maximum"], p["default"]) for p in info["models"][1]["parameters"]}
    assert ranges == {
        "max_tokens": ("integer", 1, 3500, 256),
        "temperature": ("number", 0, 5, 0.6),
        "top_p": ("number", 0, 2, None),
        "top_k": ("integer", 1, 50, None),
        "seed": ("integer", 1, 9999999999, None),
        "repetition_penalty": ("number", 0, 2, None),
        "frequency_penalty": ("number", 0, 2, None),
        "presence_penalty": ("number", 0, 2, None),
    }
    assert len(info["legend"]) == 6


@pytest.mark.parametrize(
    "inputs",
    [
        {"seed": 7, "temperature": 1.2, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1},
        {"seed": 7, "temperature": 1},  # no step at all
        {"temperature": 0, "seed": 7},
        {"seed": 7, "lora": "pirate", "raw": True},
    ],
)
def test_it_is_the_answer_of_the_run_route_token_by_token(address, ai, inputs):
    tokens, result = run(address, **inputs)
    native = ai.run(GEMMA_2B, {"prompt": "Tell me a story."} | inputs)
    assert (result["response"], result["usage"], result["seed"]) == (native["response"], native["usage"], 7)
    assert "".join(token["text"] for token in tokens) == native["response"]
    assert [token["t"] for token in tokens] == list(range(native["usage"]["completion_tokens"]))


def test_every_token_comes_with_its_candidates_and_steps(address):
    tokens, _ = run(address, seed=7, temperature=1.2, top_k=40, top_p=0.9)
    for token in tokens:
        assert [column["title"] for column in token["columns"]] == ["model", "temperature 1.2", "top k 40", "top p 0.9"]
        (chosen,) = [row for row in token["rows"] if row["chosen"]]
        assert chosen["id"] == token["id"]
        assert math.isclose(chosen["probs"][0], token["prob"], rel_tol=1e-5)  # six digits are sent
        assert math.isclose(chosen["probs"][-1], token["final"], rel_tol=1e-5)
        assert token["interval"][0] <= token["u"] < token["interval"][1]
        assert "top_k 40" in token["why"]


def test_a_drawn_seed_is_returned_and_reproduces_the_answer(address):
    tokens, result = run(address, temperature=2)
    again, same = run(address, temperature=2, seed=result["seed"])
    assert (again, same) == (tokens, result)


@pytest.mark.parametrize(
    "body", [[], {}, {"model": 3}, {"model": GEMMA_2B}, {"model": "x", "inputs": {}}, {"model": GEMMA_2B, "inputs": []}]
)
def test_bad_requests_get_the_envelope(address, body):
    reply = ask(address, RUN, body)
    assert reply.status == 400
    assert reply.code in (5006, 5007)


def test_what_an_answer_keeps_is_bounded(endless, monkeypatch):
    monkeypatch.setattr("refgemma.workers_ai.server.playground.RECORDED_BYTES", 4 * 1000 * 30)  # 30 tokens of tiny-it
    with serving(create_app({GEMMA_2B: replace(endless)}, {})) as address:
        assert ask(address, INFO).json["models"][0]["parameters"][0]["maximum"] == 30
        assert len(run(address)[0]) == 30


def test_only_so_many_answers_are_on_record_at_a_time(endless, monkeypatch):
    monkeypatch.setattr("refgemma.workers_ai.server.playground.RECORDED", 1)
    body = {"model": GEMMA_2B, "inputs": {"prompt": "a", "max_tokens": 8000}}
    with serving(create_app({GEMMA_2B: endless}, {})) as address:
        with sent(address, RUN, body) as first:
            assert first.status == 200
            second = ask(address, RUN, body)
            assert (second.status, second.code) == (429, 3040)
        body["inputs"]["max_tokens"] = 1
        wait_for(lambda: ask(address, RUN, body).status == 200)  # the place is given back


def test_an_answer_that_cannot_begin_gives_its_place_back(monkeypatch):
    monkeypatch.setattr("refgemma.workers_ai.server.playground.RECORDED", 1)
    app = create_app({GEMMA_2B: tiny_it()}, {})

    def full(*args, **options):
        raise AiError(3040, "planted")

    body = {"model": GEMMA_2B, "inputs": {"prompt": "a", "max_tokens": 1}}
    with serving(app) as address:
        with monkeypatch.context() as patch:
            patch.setattr(app.state.service, "submit", full)
            assert "planted" in ask(address, RUN, body).message
        assert ask(address, RUN, body).status == 200


def test_another_model_is_not_a_stand_in():
    with serving(create_app({GEMMA_2B: replace(tiny_it(), name="gemma-2b-it")}, {})) as address:
        info = ask(address, INFO).json
        assert (info["notice"], info["models"][0]["stand_in"]) == ("", False)
        assert info["models"][0]["answered_by"] == "gemma-2b-it"
