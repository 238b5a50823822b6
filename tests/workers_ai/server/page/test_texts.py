"""Texts stay texts, on the page and in the programs to copy."""

import json
import shutil
import subprocess
import sys

import pytest

from refgemma.workers_ai.pages import GEMMA_2B
from refgemma.workers_ai.server.app import create_app
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import serving, wait_for
from tests.workers_ai.server.page.visitor import NASTY, QUESTION, native

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("form", ["prompt", "chat"])
def test_copied_programs_request_the_same_answer(page, driver, form):
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.address}
    driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
    page.set(temperature=0, max_tokens=12)
    if form == "chat":
        page.chat()
        page.send("What is 17 + 25?")
    page.choose("lora", "pirate")
    page("document.getElementById('text').value = arguments[0]", NASTY)
    page("document.getElementById('text').dispatchEvent(new Event('input', {bubbles: true}))")
    page.driver.find_element("css selector", "#code summary").click()
    want = native(page.address, **page("inputs(arguments[0])", NASTY))
    copied = {}
    for name in ("curl", "python"):
        page.driver.find_element("css selector", f"[data-copies={name}]").click()
        wait_for(lambda: page.text("status") == "Copied")
        copied[name] = driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
        assert copied[name] == page.text(name)
        assert not set(copied[name]) & set("\u202e\u2067")  # nothing that makes a program look like another
        page("document.getElementById('status').textContent = ''")
    run = {"capture_output": True, "text": True, "encoding": "utf-8"}
    python = subprocess.run([sys.executable, "-c", copied["python"]], **run)
    assert (python.stdout.removesuffix("\n"), python.stderr) == (want, "")
    if shutil.which("curl"):
        curl = subprocess.run(["sh", "-c", copied["curl"]], **run)
        assert json.loads(curl.stdout)["result"]["response"] == want


def test_texts_are_texts(page):
    page.set(max_tokens=1)
    page("document.getElementById('text').value = arguments[0]", NASTY)
    page["send"].click()
    page.settle()
    assert page("document.querySelector('.user .said').textContent") == NASTY
    token = {
        "t": 1,
        "text": NASTY,
        "label": NASTY,
        "surprise": 5,
        "prob": 0.1,
        "nats": 1,
        "final": 1,
        "near_tie": False,
    }
    token |= {"entropy": [1, 1], "rank": 0, "kept": 1, "u": 0.5, "interval": [0, 1], "flip": 1, "why": NASTY, "id": 1}
    token |= {"columns": [{"title": NASTY, "note": NASTY}], "rows": [
        {"id": 1, "label": NASTY, "chosen": True, "mark": "", "probs": [1], "logits": [1]}]}  # fmt: skip
    page("add(turns[1], arguments[0])", token)
    page.tokens()[-1].click()
    assert page.text("name") == page.text("why") == NASTY
    assert page("document.querySelectorAll('img, script:not([src])').length") == 0
    assert page("typeof hacked") == "undefined"
    assert page("getComputedStyle(document.querySelector('.user .said')).unicodeBidi") == "isolate"
    assert page("getComputedStyle([...document.querySelectorAll('.token')].at(-1)).display") == "inline-block"


def test_a_name_of_an_adapter_is_a_text(visit):
    with serving(create_app({GEMMA_2B: tiny_it()}, {"<img src=x onerror=hacked=1>\u202e": "pirate"})) as address:
        page = visit(address)
        page.choose("lora", "<img src=x onerror=hacked=1>")
        page.set(temperature=0)
        want = native(address, prompt=QUESTION, temperature=0, lora="<img src=x onerror=hacked=1>\u202e")
        assert page.send(QUESTION) == want
        assert page("document.querySelectorAll('img').length") == 0
