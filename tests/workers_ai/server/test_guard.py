"""Access: tokens, other pages in the same browser, and host names that are not this machine's."""

import pytest

from refgemma.workers_ai.pages import GEMMA_2B
from refgemma.workers_ai.server.app import create_app
from refgemma.workers_ai.server.start import hosts_of
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import ACCOUNT, RUN, ask, serving

BODY = {"prompt": "What is 17 + 25?", "temperature": 0}


@pytest.fixture(scope="module")
def locked():
    with serving(create_app({GEMMA_2B: tiny_it()}, token="s3cret-é", hosts=hosts_of("127.0.0.1"))) as address:
        yield address


def bearer(token):
    return {"authorization": f"Bearer {token}".encode()}


@pytest.mark.parametrize(
    "headers",
    [{}, bearer(""), bearer("s3cret"), bearer("s3cret-éé"), {"authorization": "s3cret-é".encode()},
     {"authorization": "Basic s3cret-é".encode()}, {"authorization": b"Bearer \xff"}],
)  # fmt: skip
@pytest.mark.parametrize("path", [RUN, f"{ACCOUNT}/finetunes", "/playground/api/run", "/nothing"])
def test_without_the_token_everything_is_refused(locked, path, headers):
    reply = ask(locked, path, BODY, headers=headers)
    assert (reply.status, reply.code) == (401, 10000)


def test_with_the_token(locked):
    assert ask(locked, RUN, BODY, headers=bearer("s3cret-é")).result["response"] == "17 + 25 = 42."
    assert ask(locked, RUN, BODY, headers={"authorization": "bearer  s3cret-é".encode()}).status == 200


def test_an_unneeded_token_is_ignored(address):
    assert ask(address, RUN, BODY, headers=bearer("anything")).result["response"] == "17 + 25 = 42."


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://"])
def test_pages_of_other_origins_are_refused(address, origin):
    assert ask(address, RUN, BODY, headers={"origin": origin}).status == 403


def test_its_own_page_is_not(address):
    assert ask(address, RUN, BODY, headers={"origin": address}).status == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::1", "127.0.0.1@evil.example"])
def test_names_that_are_not_this_machines_are_refused(locked, host):
    assert ask(locked, RUN, BODY, headers={"host": host} | bearer("s3cret-é")).status == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8787", "[::1]:8787"])
def test_names_of_this_machine(locked, host):
    assert ask(locked, RUN, BODY, headers={"host": host} | bearer("s3cret-é")).status == 200


def test_a_server_that_others_can_reach_has_any_name():
    assert hosts_of("0.0.0.0") == hosts_of("::") == hosts_of("192.168.0.7") == ()
    assert hosts_of("127.0.0.5")[-1] == "127.0.0.5"
