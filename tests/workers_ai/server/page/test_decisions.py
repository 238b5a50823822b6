"""Looking into the tokens of an answer, with the mouse and without."""

import pytest

from refgemma.workers_ai.pages import GEMMA_2B
from tests.workers_ai.server.live import ask, events
from tests.workers_ai.server.page.visitor import QUESTION, press

pytestmark = pytest.mark.browser


def test_a_click_shows_what_each_step_did(page):
    settings = {"seed": 7, "temperature": 1.2, "top_k": 40, "top_p": 0.9}
    page.set(**settings)
    page.send("Tell me a story.")
    body = {"model": GEMMA_2B, "inputs": {"prompt": "Tell me a story."} | settings}
    decisions = [e["token"] for e in events(ask(page.address, "/playground/api/run", body).body)[:-2]]
    spans = page.tokens()
    assert len(spans) == len(decisions)
    for t in (2, 0, 9):
        spans[t].click()
        assert page.text("name") == decisions[t]["label"]
        assert page.text("why") == decisions[t]["why"]
        assert [[row[1], row[0]] for row in page.rows()] == [
            [str(row["id"]), f"{row['mark'] or ' '} {row['label']}".strip()] for row in decisions[t]["rows"]
        ]
        titles = page("[...document.querySelectorAll('thead th')].slice(2).map(c => c.firstChild.textContent)")
        assert titles == ["model", "temperature 1.2", "top k 40", "top p 0.9"]
        assert page("document.querySelectorAll('[aria-selected=true]').length") == 1
    page["next"].click()
    assert page.text("name") == decisions[10]["label"]


def test_the_keyboard_walks_through_the_tokens(page, driver):
    from selenium.webdriver.common.keys import Keys

    page.set(temperature=0)
    page.send(QUESTION)
    last = len(page.tokens()) - 1
    page("document.querySelector('.token').focus()")
    for key, place in (
        (Keys.ENTER, 0),
        (Keys.ARROW_RIGHT, 1),
        (Keys.ARROW_RIGHT, 2),
        (Keys.ARROW_LEFT, 1),
        (Keys.END, last),
        (Keys.ARROW_RIGHT, last),
        (Keys.HOME, 0),
    ):
        press(driver, key)
        assert page("[shown.t, turns[1].spans.indexOf(document.activeElement)]") == [place, place]
        assert page.text("name") == page("turns[1].tokens[shown.t].label")
    press(driver, Keys.ESCAPE)
    assert page("document.getElementById('shown').hidden")
