"""Many clients at once: full queues, clients that leave, clients that do not read, answers that do not mix."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from refgemma.workers_ai.pages import GEMMA_2B
from refgemma.workers_ai.server.app import create_app
from tests.workers_ai.server.live import ACCOUNT, RUN, ask, events, sent, serving, wait_for

CHAT = f"{ACCOUNT}/v1/chat/completions"
LONG = {"prompt": "a", "raw": True, "max_tokens": 8000, "seed": 7}  # of a model that never ends by itself


class Watched:
    """A server whose engine can be looked at."""

    def __init__(self, gemma, **options):
        self.app = create_app({GEMMA_2B: gemma}, {"pirate": "pirate"}, **options)
        self.service = self.app.state.service
        (self.engine,) = self.service._engines.values()
        self.streams = []
        submit = self.service.submit

        def watched(*args, **kwargs):
            self.streams.append(submit(*args, **kwargs))
            return self.streams[-1]

        self.service.submit = watched

    @property
    def idle(self):
        return repr(self.engine) == f"Batching: 0 of {self.engine.max_rows} rows at work, 0 waiting"

    def written(self, index):
        return len(self.streams[index]._request.row.output)


def test_a_full_queue_is_said_at_once(endless):
    watched = Watched(endless, max_rows=1, max_waiting=1)
    with serving(watched.app) as address:
        with sent(address, RUN, LONG | {"stream": True}) as first, sent(address, RUN, LONG | {"stream": True}):
            assert first.status == 200
            third = ask(address, RUN, {"prompt": "a"})
            assert (third.status, third.code, third.headers["retry-after"]) == (429, 3040, "1")
        wait_for(lambda: watched.idle)
        assert ask(address, RUN, LONG | {"max_tokens": 3}).result["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RUN, LONG | {"stream": True}),
        (RUN, LONG),
        (CHAT, {"model": GEMMA_2B, "messages": [{"role": "user", "content": "a"}],
                "max_tokens": 8000, "stream": True}),
        ("/playground/api/run", {"model": GEMMA_2B, "inputs": LONG}),
    ],
)  # fmt: skip
def test_a_client_that_leaves_stops_its_answer(endless, path, body):
    watched = Watched(endless)
    with serving(watched.app) as address:
        host = urlsplit(address)
        data = json.dumps(body).encode()
        with socket.create_connection((host.hostname, host.port)) as client:
            client.sendall(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            wait_for(lambda: watched.streams and watched.written(0) > 2)
        wait_for(lambda: watched.idle)
        assert watched.streams[0]._request.cancelled
        assert watched.written(0) < 8000


def test_a_client_that_does_not_read_delays_no_other(endless):
    watched = Watched(endless, max_rows=2)
    chat = {"model": GEMMA_2B, "messages": [{"role": "user", "content": "a"}], "seed": 7, "max_tokens": 500}
    with serving(watched.app, buffer=4096) as address:
        # Some 95 kB in chunks: more than the buffers of both sockets and the server's own 64 kB.
        with sent(address, CHAT, chat | {"stream": True}, buffer=4096) as unread:
            alone = ask(address, RUN, LONG | {"max_tokens": 20, "stream": True})
            assert len(events(alone.body)) > 2
            wait_for(lambda: watched.idle)  # the answer was written to its end, and waits
            assert watched.written(0) == 500
            assert ask(address, RUN, LONG | {"max_tokens": 5}).status == 200
            *chunks, done = events(unread.read())
        assert done == "[DONE]"
        whole = ask(address, CHAT, chat).json["choices"][0]["message"]["content"]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole


def test_many_at_once_are_answered_as_each_alone(address, ai):
    asked = [
        {"prompt": f"What is {n} + {n + 1}?", "seed": n + 1, "temperature": 0, "stream": n % 3 == 0}
        | ({"lora": "pirate"} if n % 2 else {})
        for n in range(24)
    ]
    alone = [ai.run(GEMMA_2B, inputs | {"stream": False}) for inputs in asked]
    with ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(lambda inputs: ask(address, RUN, inputs), asked))
    for inputs, reply, wanted in zip(asked, replies, alone, strict=True):
        if inputs["stream"]:
            *chunks, last, done = events(reply.body)
            assert done == "[DONE]"
            assert {"response": "".join(chunk["response"] for chunk in chunks), "usage": last["usage"]} == wanted
        else:
            assert reply.result == wanted


def test_an_answer_that_fails_half_way_ends_in_an_error_and_no_done(endless, monkeypatch):
    watched = Watched(endless)

    def fail(self, scores):
        raise RuntimeError("planted, with a secret in it")

    with serving(watched.app) as address, sent(address, RUN, LONG | {"stream": True}) as response:
        response.readline(), response.readline()  # an event, and the empty line after it
        monkeypatch.setattr("refgemma.generation.Row.next", fail)
        *_, last = response.read().decode().split("\n\n")[:-1]
    error = json.loads(last.removeprefix("data: "))
    assert error["errors"] == [{"message": "AiError: AiError: Internal server error", "code": 3043}]


def test_closing_ends_streams_with_an_error(endless):
    watched = Watched(endless)
    with serving(watched.app) as address, sent(address, RUN, LONG | {"stream": True}) as response:
        response.readline(), response.readline()  # an event, and the empty line after it
        threading.Thread(target=watched.service.close, args=(0,)).start()
        *_, last = response.read().decode().split("\n\n")[:-1]
        assert json.loads(last.removeprefix("data: "))["errors"][0]["code"] == 3008
        after = ask(address, RUN, {"prompt": "a"})
        assert (after.status, after.code) == (408, 3008)
