"""Requests that get an error: its code, its status, its envelope; and garbage of every kind, which also gets one."""

import contextlib
import json
import random
import socket
import time
from urllib.parse import urlsplit

import pytest

from refgemma.workers_ai import AiError, read, schema
from refgemma.workers_ai.pages import GEMMA_2B
from refgemma.workers_ai.server import limits
from refgemma.workers_ai.server.http import parse
from tests.workers_ai.server.live import ACCOUNT, PATIENCE, RUN, ask

ENVELOPE = ["errors", "success", "result", "messages"]


@pytest.mark.parametrize(
    ("body", "code", "status", "words"),
    [
        ({}, 5006, 400, "oneOf at '/' not met, 0 matches: required properties at '/' are 'prompt'"),
        ({"messages": [{"role": "user", "content": []}]}, 5006, 400, "'array' not in 'string'"),
        ({"prompt": "a", "temperature": 6}, 5006, 400, "/temperature"),
        ({"prompt": "a", "lora": "00000000-0000-0000-0000-000000000"}, 3037, 404, "not found"),
        ({"prompt": "a", "lora": "../pirate"}, 3037, 404, "not found"),
        ({"prompt": "a", "lora": "/etc/passwd\0"}, 3037, 404, "not found"),
        ({"prompt": "a " * 9000}, 5006, 400, "8192 tokens"),
        (b"", 3003, 400, "body"),
        (b" \n", 3003, 400, "body"),
        (b'{"prompt": "a"', 5006, 400, "JSON"),
        (b'{"prompt": "a", "temperature": NaN}', 5006, 400, "NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', 5006, 400, "Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', 5006, 400, "temperature"),
        (b"\xef\xbb\xbf" + b'{"prompt": "a"}', 5006, 400, "JSON: it begins with a byte order mark"),
        (b'{"prompt": "\xff"}', 5006, 400, "UTF-8"),
        (b"[" * 100_000, 5006, 400, "nested"),
        (b'{"prompt": "a", "x": ' + b"[" * 200 + b"]" * 200 + b"}", 5006, 400, "nested"),
        (
            b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
            5006,
            400,
            "JSON: it has a whole number with too many digits",
        ),
        (b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}", 5006, 400, "seed"),
        (b'{"prompt": "\\ud800", "raw": true}', 5006, 400, "surrogate"),
        (b'"prompt"', 5006, 400, "object"),
        (b"null", 5006, 400, "object"),
    ],
)
def test_an_error_has_its_code_its_status_and_the_envelope(address, body, code, status, words):
    reply = ask(address, RUN, body)
    assert (reply.status, reply.code) == (status, code)
    assert words in reply.message
    assert list(reply.json) == ENVELOPE
    assert reply.json["success"] is False


def test_the_last_of_duplicate_keys_counts(address):
    body = b'{"prompt": "a", "prompt": "What is 17 + 25?", "temperature": 6, "temperature": 0}'
    assert ask(address, RUN, body).result["response"] == "17 + 25 = 42."


@pytest.mark.parametrize("model", ["@cf/google/nothing", "x", "..", "../../../etc/passwd", "%00", "%ff", "a" * 5000])
def test_an_unknown_model(address, model):
    reply = ask(address, f"{ACCOUNT}/run/{model}", {"prompt": "a"})
    assert (reply.status, reply.code) == (400, 5007)
    assert len(reply.body) < 500


def test_a_body_that_is_too_large_is_not_read(address):
    announced = {"content-length": str(limits.JSON_BYTES + 1)}
    reply = ask(address, RUN, b"{", headers=announced)  # the rest is never sent, and an answer comes all the same
    assert (reply.status, reply.code) == (413, 3006)


@pytest.mark.parametrize("announced", [True, False])
def test_a_client_that_sends_a_whole_oversized_body_can_read_the_error(address, announced):
    length, line = 3 * limits.JSON_BYTES, "Transfer-Encoding: chunked"
    body, line = (b" " * length, f"Content-Length: {length}") if announced else (b"%x\r\n" % length, line)
    body = body if announced else body + b" " * length + b"\r\n0\r\n\r\n"
    host = urlsplit(address)
    with socket.create_connection((host.hostname, host.port), timeout=PATIENCE) as connection:
        connection.sendall(f"POST {RUN} HTTP/1.1\r\nHost: a\r\n{line}\r\n\r\n".encode() + body)
        with connection.makefile("rb") as received:  # only now, when all of it has left
            assert b" 413 " in received.readline()
            assert b"3006" in received.read()  # to the end: no reset


def test_a_client_that_never_stops_sending_is_cut_off(address, monkeypatch):
    monkeypatch.setattr("refgemma.workers_ai.server.http.DRAIN_SECONDS", 0.05)
    host = urlsplit(address)
    with socket.create_connection((host.hostname, host.port), timeout=PATIENCE) as connection:
        connection.sendall(f"POST {RUN} HTTP/1.1\r\nHost: a\r\nContent-Length: {10**12}\r\n\r\n ".encode())
        with connection.makefile("rb") as received:
            assert b"3006" in received.read()  # and the end, without the rest


def test_a_body_that_does_not_say_how_large_it_is(address):
    endless = (b" " * 65536 for _ in range(10**9))
    reply = raw(address, RUN, {"transfer-encoding": "chunked"}, (b"%x\r\n%b\r\n" % (len(c), c) for c in endless))
    assert b" 413 " in reply.split(b"\r\n")[0]
    assert b"3006" in reply


def test_a_body_that_stops_coming(address, monkeypatch):
    monkeypatch.setattr("refgemma.workers_ai.server.http.BODY_SECONDS", 0.05)
    reply = ask(address, RUN, b'{"prompt":', headers={"content-length": "100"})
    assert (reply.status, reply.code) == (408, 3007)


def test_a_body_that_trickles_is_not_waited_for_any_longer(address, monkeypatch):
    monkeypatch.setattr("refgemma.workers_ai.server.http.BODY_SECONDS", 0.5)
    trickle = (time.sleep(0.02) or b"1\r\n \r\n" for _ in range(200))  # each byte well within the time
    reply = raw(address, RUN, {"transfer-encoding": "chunked"}, trickle)
    assert b" 408 " in reply.split(b"\r\n")[0]
    assert b"3007" in reply


@pytest.mark.parametrize(
    "body",
    [
        '{"messages": [' + ",".join(["{}"] * 1_000_000) + "]}",
        '{"messages": [' + ",".join(["0"] * 8000) + "]}",
        '{"messages": [{"role": "user", "content": "a"}], "tools": [' + ",".join(["{}"] * 1_000_000) + "]}",
        '{"messages": [{"role": "user", "content": "a"}], "functions": [' + ",".join(["{}"] * 1_000_000) + "]}",
        '{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "a", "description": "b", "parameters": '
        '{"type": "object", "properties": {}, "required": [' + ",".join(['"a"'] * 700_000) + "]}}]}",
        '{"prompt": "a", "image": [' + ",".join(["0"] * 1_000_000) + "]}",
        '{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"anyOf": ['
        + ",".join(["0"] * 1_000_000) + "]}}}",
    ],
    ids=["empty messages", "bad messages", "tools", "functions", "names", "image", "schemas"],
)  # fmt: skip
def test_of_a_million_faults_few_are_examined(body, monkeypatch):
    looks = 0
    look = schema.validator_class().descend

    def counted(*args, **kwargs):
        nonlocal looks
        looks += 1
        return look(*args, **kwargs)

    monkeypatch.setattr(schema.validator_class(), "descend", counted)
    with pytest.raises(AiError) as caught:
        read(GEMMA_2B, parse(body.encode()))
    assert caught.value.code == 5006
    assert len(str(caught.value)) < 2500
    # In each of two branches some values of each of the messages or tools that make up `SHOWN` problems and one more.
    assert looks < 2 * 10 * (schema.SHOWN + 1)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", RUN, 405, 7001),
        ("DELETE", f"{ACCOUNT}/finetunes", 405, 7001),
        ("GET", "/client/v4/nothing", 404, 7000),
        ("GET", "//", 404, 7000),
        ("GET", f"{ACCOUNT}/../../../openapi.json", 404, 7000),
    ],
)
def test_paths_without_a_route(address, method, path, status, code):
    reply = ask(address, path, method=method)
    assert (reply.status, reply.code) == (status, code)
    assert reply.json["result"] is None


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST " + RUN.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST " + RUN.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST " + RUN.encode() + b" HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 30_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nBad Header\x00: 1\r\n\r\n",
        b"POST " + RUN.encode() + b" HTTP/1.0\r\nContent-Length: 2\r\nAuthorization: \xff\xfe\r\n\r\n{}",
        b"POST " + RUN.encode() + b" HTTP/1.0\r\nHost: [::1\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_garbage_gets_status_400_or_is_disconnected(address, request_bytes):
    reply = raw(address, None, {}, [request_bytes])
    assert reply == b"" or reply.split(b" ")[1].startswith(b"4"), reply
    assert ask(address, RUN, {"prompt": "What is 17 + 25?", "temperature": 0}).result["response"] == "17 + 25 = 42."


def test_random_bytes_for_a_body_are_never_an_internal_error(address):
    rng = random.Random(7)
    good = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "seed": 5}).encode()
    for _ in range(300):
        body = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(body))
            body[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        assert ask(address, RUN, bytes(body)).status in (200, 400, 404)


def raw(address, path, headers, pieces):
    """Return the response to raw bytes; a server that stops reading has already responded."""
    host = urlsplit(address)
    with socket.create_connection((host.hostname, host.port), timeout=PATIENCE) as connection:
        if path is not None:
            lines = [f"POST {path} HTTP/1.1", "Host: a", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
            connection.sendall("\r\n".join(lines).encode())
        received = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
                connection.settimeout(0.001)
                with contextlib.suppress(TimeoutError):
                    received += connection.recv(65536)
                connection.settimeout(PATIENCE)
                if received:
                    break
            if not received:
                connection.shutdown(socket.SHUT_WR)
            while more := connection.recv(65536):
                received += more
        except (ConnectionResetError, BrokenPipeError):
            pass
        return received
