"""The playground in the system's Chromium; after each test, that nothing was complained of and no other host asked."""

import json

import pytest

from tests.sampling.browser import browser
from tests.workers_ai.server.live import wait_for
from tests.workers_ai.server.page.visitor import Page


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def visit(driver):
    """``visit(address)``: the page, once it is ready."""
    pages = []

    def visit(address, ready="!document.getElementById('main').hidden"):
        driver.get("about:blank")
        driver.get_log("performance")
        driver.get(address + "/")
        pages.append(Page(driver, address))
        wait_for(lambda: pages[-1](ready))
        return pages[-1]

    yield visit
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    complaints = [entry["message"] for entry in driver.get_log("browser")]
    assert len([c for c in complaints if "Failed to load resource" in c]) == sum(page.refusals for page in pages)
    assert [c for c in complaints if "Failed to load resource" not in c] == []
    sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [
        message["params"]["request"]["url"] for message in sent if message["method"] == "Network.requestWillBeSent"
    ]
    assert asked
    assert [url for url in asked if not any(url.startswith(page.address + "/") for page in pages)] == []


@pytest.fixture
def page(visit, address):
    return visit(address)
