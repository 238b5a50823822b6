"""Connections: data is sent at once, idle connections are closed, and everything else has limits."""

import asyncio
import socket
import threading
from urllib.parse import urlsplit

import pytest

from refgemma.workers_ai import AiError
from refgemma.workers_ai.pages import GEMMA_2B
from refgemma.workers_ai.server.app import create_app
from refgemma.workers_ai.server.service import PreparationPool
from refgemma.workers_ai.server.start import listen
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import PATIENCE, RUN, ask, sent, serving

BODY = {"prompt": "What is 17 + 25?", "temperature": 0}


@pytest.mark.parametrize(("made_by", "at_once"), [(listen, True), (lambda *at: socket.create_server(at), False)])
def test_connections_send_at_once(made_by, at_once):
    async def option():
        found = asyncio.get_running_loop().create_future()

        class Look(asyncio.Protocol):
            def connection_made(self, transport):
                sock = transport.get_extra_info("socket")
                found.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        with made_by("127.0.0.1", 0) as listener:
            server = await asyncio.get_running_loop().create_server(Look, sock=listener)
            with socket.create_connection(listener.getsockname()):
                value = await found
            server.close()
        return value

    assert bool(asyncio.run(option())) == at_once


@pytest.mark.parametrize("head", [b"", b"POST / HTTP/1.1\r\nHost:", b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\nG"])
def test_a_connection_that_does_not_ask_is_closed(head, monkeypatch):
    monkeypatch.setattr("refgemma.workers_ai.server.start.HEAD_SECONDS", 0.05)
    with serving(create_app({GEMMA_2B: tiny_it()}, {})) as address:
        host = urlsplit(address)
        with socket.create_connection((host.hostname, host.port), timeout=PATIENCE) as connection:
            connection.sendall(head)
            while connection.recv(65536):
                pass


def test_a_connection_that_waits_for_its_answer_is_not(endless, monkeypatch):
    monkeypatch.setattr("refgemma.workers_ai.server.start.HEAD_SECONDS", 0.001)
    with serving(create_app({GEMMA_2B: endless}, {})) as address:
        assert ask(address, RUN, BODY | {"max_tokens": 200}).result["usage"]["completion_tokens"] == 200


def test_open_requests_have_a_bound_and_idle_connections_do_not_count(endless, monkeypatch):
    monkeypatch.setattr("refgemma.workers_ai.server.app.REQUESTS", 1)
    with serving(create_app({GEMMA_2B: endless}, {})) as address:
        host = urlsplit(address)
        idle = [socket.create_connection((host.hostname, host.port)) for _ in range(20)]
        with sent(address, RUN, BODY | {"stream": True, "max_tokens": 8000}) as first:
            assert first.status == 200
            second = ask(address, RUN, BODY)
            assert (second.status, second.code, second.headers["retry-after"]) == (429, 3040, "1")
        for connection in idle:
            connection.close()


def test_no_more_requests_are_read_at_a_time_than_may_wait():
    async def three():
        pool, go = PreparationPool(2), threading.Event()
        both = [asyncio.ensure_future(pool.run(go.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(AiError) as caught:
            await pool.run(len, "abc")
        go.set()
        await asyncio.gather(*both)
        after = await pool.run(len, "abc")
        pool.close()
        with pytest.raises(AiError, match="3008"):
            await pool.run(len, "abc")
        return caught.value.code, after

    assert asyncio.run(three()) == (3040, 3)


def test_a_request_beyond_the_limit_is_refused_while_others_are_read(monkeypatch):
    app = create_app({GEMMA_2B: tiny_it()}, {}, max_rows=1, max_waiting=0)
    service, go, begun = app.state.service, threading.Event(), threading.Event()
    prepare = service.prepare

    def slow(*args, **kwargs):
        begun.set()
        assert go.wait(PATIENCE)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(service, "prepare", slow)
    with serving(app) as address:
        first = threading.Thread(target=ask, args=(address, RUN, BODY))
        first.start()
        assert begun.wait(PATIENCE)
        assert ask(address, RUN, BODY).code == 3040
        assert ask(address, "/client/v4/accounts/a/ai/finetunes", {"name": "x"}).code == 3040
        go.set()
        first.join()
        assert ask(address, RUN, BODY).result["response"] == "17 + 25 = 42."
