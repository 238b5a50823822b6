"""The page in a real browser: what it shows, what a click and the keyboard do, and that it asks nobody for anything."""

import json
import re

import numpy as np
import pytest

from refgemma.sampling import SamplingParams, record_logits, show
from tests.sampling.browser import browser
from tests.sampling.shown import AWKWARD, SPELLED, awkward_record, plain_record

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def visit(driver, tmp_path):
    """``visit(record)``: a function that runs JavaScript on the record's page, opened from disk."""

    def visit(record, anchor="", **options):
        path = tmp_path / "a page.html"
        path.write_text(show.page(record, **options), encoding="ascii")
        driver.get("about:blank")
        driver.get_log("performance")  # what the browser did for its own first page
        driver.get(path.as_uri() + anchor)
        return lambda script, *arguments: driver.execute_script(f"return {script}", *arguments)

    yield visit
    complaints = [entry["message"] for entry in driver.get_log("browser")]
    assert complaints == []
    sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [
        message["params"]["request"]["url"] for message in sent if message["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    assert [url for url in asked if not url.startswith("file:///")] == []


def press(driver, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def cells(js):
    """The table as the page shows it."""
    return js("[...document.querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.textContent.trim()))")


def test_the_first_token_is_shown(visit):
    js = visit(plain_record(), title="Two tokens")
    assert js("document.title") == js("document.querySelector('h1').textContent") == "Two tokens"
    assert js("document.getElementById('text').textContent") == " red\n"
    assert js("document.getElementById('name').textContent") == "' red'"
    assert js("document.getElementById('why').textContent") == plain_record().explain(0)
    assert cells(js) == [
        ["\u25b8 ' red'", "0", "53.3 %", "75.3 %", "80.0 %"],
        ["' green'", "1", "26.7 %", "18.8 %", "20.0 %"],
        ["'blue'", "2", "13.3 %", "4.71 %", "\u2715 removed"],
        ["'\\n'", "3", "6.67 %", "1.18 %", "\u2715 removed"],
    ]
    bar, cell = js(
        "[...document.querySelectorAll('tbody tr')[0].querySelectorAll('td span i')].map(b => [b, b.parentNode])"
    )[2]
    # As wide as 80 % of its cell, but for a pixel: layout rounds to fractions of one.
    assert abs(bar.rect["width"] - 0.8 * cell.rect["width"]) < 1


def test_a_click_shows_the_candidates_of_that_token(visit, driver):
    js = visit(awkward_record())
    for t in (4, 13, 0):
        driver.find_element("id", f"t{t}").click()
        name = js("document.getElementById('name').textContent")
        assert name == repr(AWKWARD[t].replace("\u2581", " "))
        assert js("document.querySelectorAll('[aria-selected=true]').length") == 1
        assert js("document.querySelector('[aria-selected=true]').id") == f"t{t}"
        marked = [row for row in cells(js) if row[0].startswith("\u25b8")]
        assert [row[1] for row in marked] == [str(t)]


def test_the_keyboard_moves_through_the_tokens(visit, driver):
    from selenium.webdriver.common.keys import Keys

    js = visit(awkward_record())
    last = len(AWKWARD) - 1
    at = "Number(document.querySelector('[aria-selected=true]').id.slice(1))"
    for keys, place in (
        ((Keys.TAB,), 0),
        ((Keys.ARROW_RIGHT, Keys.ARROW_RIGHT), 2),
        ((Keys.ARROW_LEFT,), 1),
        ((Keys.END,), last),
        ((Keys.ARROW_RIGHT,), last),
        ((Keys.HOME,), 0),
        ((Keys.ARROW_LEFT,), 0),
    ):
        press(driver, *keys)
        assert js(at) == place
    assert js("document.activeElement.id") == "t0"
    press(driver, "s")
    surprises = [t for t, entry in enumerate(awkward_record()) if entry.raw_logprob < -3]  # below 5 % for certain
    assert js(at) <= surprises[0]
    assert js("Number(document.querySelector('[aria-selected=true]').className.match(/s(\\d)/)[1])") >= 3


def test_buttons_and_addresses(visit, driver):
    js = visit(awkward_record(), "#5")
    assert js("document.querySelector('[aria-selected=true]').id") == "t5"
    driver.find_element("id", "next").click()
    assert js("location.hash") == "#6"
    driver.find_element("id", "back").click()
    driver.find_element("id", "back").click()
    assert js("location.hash") == "#4"
    js = visit(awkward_record(), "#nonsense")
    assert js("document.querySelector('[aria-selected=true]').id") == "t0"
    assert js("document.getElementById('back').disabled")


def test_any_text_survives(visit):
    title = "</title><script>alert(1)</script> \u00e9\U0001f98a"
    js = visit(awkward_record(), title=title)
    assert js("document.title") == title
    assert js("document.getElementById('text').textContent") == SPELLED
    assert js("document.querySelectorAll('script').length") == 2
    assert js("document.querySelectorAll('b, i[onclick]').length") == js("document.querySelectorAll('aside b').length")
    wide = js("[...document.querySelectorAll('.token')].map(t => t.getBoundingClientRect().width)")
    assert min(wide) > 0  # even a token without text can be clicked


def written(*pieces):
    """A record whose tokens are these; each draw would have given the last of them."""
    T, uniforms = len(pieces), [0.99] * len(pieces)
    return record_logits(
        np.zeros((T, T)), SamplingParams(), uniforms=uniforms, tokens=range(T), piece=pieces.__getitem__
    )


LEFTS = "[...document.querySelectorAll('.token')].map(t => t.getBoundingClientRect().left)"


@pytest.mark.parametrize("control", ["\u202e", "\u202b", "\u2067", "\u202e\u2067", "\u2069\u202e"])
def test_a_token_that_turns_the_direction_turns_no_other(visit, control):
    js = visit(written("one", f"x{control}y", "two", "\u2581three", "\u202c", "four", "!"))
    lefts = js(LEFTS)
    assert lefts == sorted(lefts)
    assert js("document.querySelectorAll('.override').length") == 2


def test_words_from_right_to_left_stay_so_across_tokens(visit):
    lefts = visit(written("\u05e9\u05dc", "\u05d5\u05dd", "\u2581\u05e2\u05d5", "\u05dc\u05dd"))(LEFTS)
    assert lefts == sorted(lefts, reverse=True)


def test_candidates_are_named_without_turning_the_direction(visit):
    js = visit(written("a", "\u202eb"))
    assert [row[0] for row in cells(js)] == ["\u25b8 'a'", "\u25b9 '\\u202eb'"]
    assert "\u202e" not in js("document.querySelector('aside').textContent")


def test_five_hundred_tokens(visit, driver):
    js = visit(awkward_record(repeats=500 // len(AWKWARD) + 1))
    assert js("document.querySelectorAll('.token').length") >= 500
    from selenium.webdriver.common.keys import Keys

    press(driver, Keys.END)
    assert js("document.querySelector('[aria-selected=true]').id") == f"t{js('tokens.length') - 1}"
    top, bottom = js("(r => [r.top, r.bottom])(document.querySelector('[aria-selected=true]').getBoundingClientRect())")
    assert -1 < top < bottom < js("innerHeight") + 1  # it has scrolled there, in whole pixels


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(visit, driver, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    js = visit(awkward_record())
    ink, paper = (
        sum(map(int, re.findall(r"\d+", js(f"getComputedStyle(document.body).{name}"))[:3]))
        for name in ("color", "backgroundColor")
    )
    assert (ink < paper) == (scheme == "light")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("width", [1440, 900, 400])
def test_nothing_is_cut_off_at_any_width(visit, driver, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    js = visit(awkward_record())
    # The page itself never scrolls sideways; a table that is wider than its place does.
    assert js("document.documentElement.scrollWidth") <= width
    assert js("document.querySelector('.scroll').clientWidth") <= width
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
