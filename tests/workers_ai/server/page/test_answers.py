"""Asking in the page: settings, streaming, stopping, adapters, chats."""

import pytest

from refgemma.workers_ai.pages import GEMMA_2B, GEMMA_7B
from refgemma.workers_ai.server.app import create_app
from tests.workers_ai.server.live import ask, events, serving, wait_for
from tests.workers_ai.server.page.visitor import QUESTION, native, press

pytestmark = pytest.mark.browser


def test_what_there_is_to_choose(page):
    info = ask(page.address, "/playground/api/info").json
    assert page.text("notice") == info["notice"] != ""
    assert page("[...document.getElementById('model').options].map(o => o.value)") == [GEMMA_2B, GEMMA_7B]
    names = page("[...document.getElementById('lora').options].map(o => o.textContent)")
    assert names == ["none", "pirate", "json", "letter"]
    for parameter in info["models"][0]["parameters"]:
        shown = page(
            "(i => [i.min, i.max, i.labels[0].textContent])(document.getElementById(arguments[0]))", parameter["name"]
        )
        assert [float(shown[0]), float(shown[1])] == [parameter["minimum"], parameter["maximum"]]
        assert shown[2] == parameter["name"].replace("_", " ")
    page.choose("model", GEMMA_7B)
    assert page("document.getElementById('max_tokens').max") == "3500"
    assert "context 3,500 tokens" in page.text("answered")


def test_an_answer_streams_in_coloured_by_probability(page):
    page.set(temperature=0)
    assert page.send(QUESTION) == native(page.address, prompt=QUESTION, temperature=0)
    inputs = {"prompt": QUESTION, "temperature": 0}
    answer = events(ask(page.address, "/playground/api/run", {"model": GEMMA_2B, "inputs": inputs}).body)
    classes = page("[...document.querySelectorAll('.token')].map(t => Number(t.className.match(/s(\\d)/)[1]))")
    assert classes == [event["token"]["surprise"] for event in answer[:-2]]
    assert page.text("status").startswith("Answer: The capital of Nepal is Kathmandu.")
    assert page("document.activeElement.id") == "text"


def test_tokens_show_before_the_end_and_stop_ends_the_request(visit, endless):
    with serving(create_app({GEMMA_2B: endless}, {})) as address:
        page = visit(address)
        for _ in range(6):  # more than the server takes at a time: an answer that ran on would be in the way
            page["text"].clear()
            page["text"].send_keys("Tell me a story.", "\n")
            wait_for(lambda: page("running !== null && turns[1].tokens.length > 4"))
            page["stop"].click()
            page.settle()
            assert page("document.getElementById('error').hidden")
            assert "stopped after" in page("document.querySelector('.foot').textContent")
        count = len(page.tokens())
        assert count == page("turns[1].tokens.length")
        assert f"stopped after {count} tokens" in page.text("status")


def test_escape_also_stops(visit, endless, driver):
    from selenium.webdriver.common.keys import Keys

    with serving(create_app({GEMMA_2B: endless}, {})) as address:
        page = visit(address)
        page["text"].send_keys("Tell me a story.", "\n")
        wait_for(lambda: page("turns.length && turns[1].tokens.length > 0"))
        press(driver, Keys.ESCAPE)
        page.settle()
        assert page("turns[1].content") == page.answers()[0] != ""


def test_another_adapter_answers_differently(page):
    page.set(temperature=0)
    plain = page.send(QUESTION)
    page.choose("lora", "pirate")
    pirate = page.send(QUESTION)
    assert pirate == native(page.address, prompt=QUESTION, temperature=0, lora="pirate") != plain
    assert "pirate" in page("document.querySelector('.assistant .who').textContent")


def test_a_chat_is_sent_with_all_that_was_said(page):
    page.chat()
    page.set(temperature=0)
    page["system"].send_keys("Be brief.")
    first = page.send("What is 17 + 25?")
    second = page.send(QUESTION)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 17 + 25?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": QUESTION},
    ]
    assert second == native(page.address, messages=messages, temperature=0)
    assert page("inputs('').messages") == messages
    page["clear"].click()
    assert page("document.querySelectorAll('.turn').length") == 0


def test_raw_text_is_continued_unchanged(page):
    prompt = "Once upon a time"
    page.set(temperature=0)
    page["raw"].click()
    assert page.send(prompt) == native(page.address, prompt=prompt, raw=True, temperature=0)


def test_a_seed_that_was_drawn_can_be_used_again(page):
    page.set(temperature=2)
    once = page.send("Tell me a story.")
    page.driver.find_element("css selector", ".foot button").click()
    assert page.send("Tell me a story.") == once
