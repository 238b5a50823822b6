"""The playground's page as it is served: its files, and what it is confined to."""

import re

import pytest

from refgemma.workers_ai.server.app import create_app
from refgemma.workers_ai.server.playground import FILES
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import ask, serving


@pytest.mark.parametrize("path", FILES)
def test_every_file_is_served_and_confined(address, path):
    reply = ask(address, path)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith(FILES[path][2])
    policy = dict(part.partition(" ")[::2] for part in reply.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in policy if name.endswith("-src") and name != "default-src"} == {"'self'"}
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_the_page_names_no_file_that_is_not_there_and_no_other_host(address):
    named = re.findall(r'(?:src|href)="([^"]*)"', ask(address, "/").body.decode())
    assert {f"/{name}" for name in named} == set(FILES) - {"/"}
    for path in FILES:
        text = ask(address, path).body.decode().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert re.findall(r"https?:|@import|\burl\(|innerHTML|insertAdjacentHTML|document\.write|eval\(", text) == []


def test_the_page_has_no_script_or_style_of_its_own(address):
    text = ask(address, "/").body.decode()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text) == []


def test_the_page_comes_without_a_token_and_its_interface_does_not():
    with serving(create_app({"@cf/google/gemma-2b-it-lora": tiny_it()}, {}, token="secret")) as address:
        assert {ask(address, path).status for path in FILES} == {200}
        assert ask(address, "/playground/api/info").status == 401
