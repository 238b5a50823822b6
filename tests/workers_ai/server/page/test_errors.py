"""Errors are shown as one sentence."""

import pytest

from refgemma.workers_ai.pages import GEMMA_2B
from refgemma.workers_ai.server.app import create_app
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import serving, wait_for
from tests.workers_ai.server.page.visitor import QUESTION

pytestmark = pytest.mark.browser


def test_an_error_is_one_sentence_and_the_text_is_not_lost(page):
    text = "a b " * 20_000
    page("document.getElementById('text').value = arguments[0]", text)
    page["send"].click()
    page.settle()
    page.refusals = 1
    error = page["error"]
    assert error.is_displayed()
    assert "too many for the context of 8192 tokens" in error.text
    assert "\n" not in error.text
    assert not error.text.startswith("AiError")
    assert page("document.getElementById('text').value") == text
    assert page("document.querySelectorAll('.turn').length") == 0
    page.set(temperature=0)
    assert page.send(QUESTION).startswith("The capital")
    assert not error.is_displayed()


def test_a_number_out_of_its_range_is_not_sent(page):
    page.set(temperature=9)
    assert page.send(QUESTION) is None
    assert page("document.activeElement.id") == "temperature"


def test_a_server_that_is_gone_is_reported(visit, address):
    with serving(create_app({GEMMA_2B: tiny_it()}, {})) as own:
        page = visit(own)
    page["text"].send_keys(QUESTION, "\n")
    wait_for(lambda: page["error"].is_displayed())
    page.refusals = 1
    assert page["error"].text == "The server does not answer: is refgemma serve still running?"


def test_a_token_is_asked_for_and_never_shown(visit):
    with serving(create_app({GEMMA_2B: tiny_it()}, {}, token="secret")) as address:
        page = visit(address, "!document.getElementById('door').hidden")
        page["token"].send_keys("wrong\n")
        wait_for(lambda: page.text("notice") == "Authentication error")
        page["token"].clear()
        page["token"].send_keys("secret\n")
        wait_for(lambda: page("!document.getElementById('main').hidden"))
        page.refusals = 2
        page.set(temperature=0)
        assert page.send(QUESTION).startswith("The capital")
        for name in ("curl", "python"):
            assert "REFGEMMA_TOKEN" in page.text(name)
            assert "secret" not in page.text(name)


def test_an_answer_that_breaks_off_is_kept_and_reported(visit, endless):
    app = create_app({GEMMA_2B: endless}, {})
    with serving(app) as address:
        page = visit(address)
        page["text"].send_keys("Tell me a story.", "\n")
        wait_for(lambda: page("turns.length && turns[1].tokens.length > 4"))
        app.state.service.close(0)
        page.settle()
        assert page["error"].text == "Request was aborted: the server is stopping"
        assert page("turns[1].content") == page.answers()[0] != ""


def test_a_cut_connection_is_reported(page):
    script = """
    const all = async response => { for await (const event of events(response)); };
    const cut = end => all(new Response(new ReadableStream({start: end}))).catch(error => error.message);
    Promise.all([cut(way => way.close()), cut(way => way.error(new TypeError("network error")))]).then(arguments[0]);
    """
    message = "The answer broke off: the server closed the connection."
    assert page.driver.execute_async_script(script) == [message, message]
