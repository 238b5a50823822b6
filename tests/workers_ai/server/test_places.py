"""A place that a request took is free before its client can have read the end of the answer, whichever place it is."""

import asyncio
import json
import re
import tempfile
import threading
from pathlib import Path

import pytest

from refgemma.batching import Batching
from refgemma.sampling import SamplingParams
from refgemma.workers_ai.pages import GEMMA_2B
from refgemma.workers_ai.server.app import create_app
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import ACCOUNT, PATIENCE, RUN, form

ASK = {"prompt": "What is 17 + 25?", "temperature": 0}
CHAT = {"model": GEMMA_2B, "messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0}
REQUESTS = {
    "run": (RUN, ASK),
    "run, streamed": (RUN, ASK | {"stream": True}),
    "chat": (f"{ACCOUNT}/v1/chat/completions", CHAT),
    "chat, streamed": (f"{ACCOUNT}/v1/chat/completions", CHAT | {"stream": True}),
    "playground": ("/playground/api/run", {"model": GEMMA_2B, "inputs": ASK}),
    "refused": (RUN, {"prompt": 1}),
    "description": ("/openapi.json", None),
}


FULL = re.compile(rb'"code":"?3040')  # the digits alone may be part of a drawn seed


async def asked(app, path, content, *, headers=(), then=None):
    """Status and body of one request; `then` is started in the step of the event loop that sends the last bytes."""
    messages = [{"type": "http.request", "body": content or b"", "more_body": False}]
    status, body, following = 0, b"", []

    async def receive():
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message):
        nonlocal status, body
        if message["type"] == "http.response.start":
            status = message["status"]
            return
        body += message.get("body", b"")
        if then is not None and not message.get("more_body", False):
            following.append(asyncio.ensure_future(then()))

    scope = {
        "type": "http",
        "method": "GET" if content is None else "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), *headers],
        "http_version": "1.1",
        "app": app,
    }
    await app(scope, receive, send)
    return status, body, [await one for one in following]


@pytest.fixture
def app(monkeypatch, tmp_path):
    """A server with one place of every kind, and none to wait in."""
    monkeypatch.setattr("refgemma.workers_ai.server.app.REQUESTS", 1)
    monkeypatch.setattr("refgemma.workers_ai.server.playground.RECORDED", 1)
    monkeypatch.setattr("refgemma.workers_ai.server.finetunes.UPLOADS", 1)
    app = create_app({GEMMA_2B: tiny_it()}, {}, max_rows=1, max_waiting=0, finetunes=tmp_path)
    yield app
    app.state.service.close(0)
    app.state.service.finetunes.close()
    app.state.service.preparation.close()


@pytest.mark.parametrize("name", REQUESTS)
def test_a_client_may_ask_again_at_once(app, name):
    path, body = REQUESTS[name]
    content = None if body is None else json.dumps(body).encode()
    want = 400 if name == "refused" else 200

    async def five_in_a_row(left=5):
        status, answer, following = await asked(
            app, path, content, then=(lambda: five_in_a_row(left - 1)) if left > 1 else None
        )
        return [(status, bool(FULL.search(answer))), *(following[0] if following else [])]

    assert asyncio.run(five_in_a_row()) == [(want, False)] * 5


def test_an_upload_leaves_no_place_descriptor_or_file_behind(app, monkeypatch, tmp_path):
    monkeypatch.setattr("refgemma.workers_ai.server.finetunes.UPLOAD_BYTES", 3_000_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    async def upload(content, times=2):
        body, given = form("adapter_model.safetensors", content)
        headers = [
            (b"content-type", given["content-type"].encode())
        ]  # no length: only reading tells that it is too large
        again = (lambda: upload(content, times - 1)) if times > 1 else None
        path = f"{ACCOUNT}/finetunes/none/finetune-assets"
        status, answer, following = await asked(app, path, body, headers=headers, then=again)
        return [(status, bool(FULL.search(answer))), *(following[0] if following else [])]

    def temporary():
        folder = Path("/proc/self/fd")
        links = [str(entry.readlink()) for entry in folder.iterdir() if entry.is_symlink()] if folder.exists() else []
        return [link for link in links if str(tmp_path) in link] + list((tmp_path / "temporary").iterdir())

    # A whole upload, larger than what is kept in memory, to a finetune that does not exist; and one that is too large.
    for content in (b"x" * 2_000_000, b"x" * 4_000_000):
        found = asyncio.run(upload(content))
        assert [full for _, full in found] == [False, False]
        assert all(status >= 400 for status, _ in found)
        assert temporary() == []


def test_the_row_of_an_answered_request_is_free_when_its_last_event_arrives():
    gemma = tiny_it()
    prompt, settings = gemma.encode_prompt("Who are you?"), SamplingParams(temperature=0.0, max_tokens=3)
    answers, done = [], threading.Event()
    with Batching(gemma, max_rows=1, max_waiting=0) as engine:

        def on_event(event):  # runs between the event and anything else that the worker does
            if isinstance(event, Exception) or event.result is not None:
                answers.append(event)
                if len(answers) == 4:
                    done.set()
                else:
                    engine.submit(prompt, settings, on_event=on_event)

        engine.submit(prompt, settings, on_event=on_event)
        assert done.wait(PATIENCE)
    assert [answer.result.finish_reason for answer in answers] == ["length"] * 4


def test_a_cancelled_request_gives_its_row_to_the_next():
    gemma = tiny_it()
    prompt = gemma.encode_prompt("Who are you?")
    with Batching(gemma, max_rows=1, max_waiting=0) as engine:
        for _ in range(5):
            stream = engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=1000))
            next(iter(stream))
            stream.cancel()
        last = engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=2))
        assert list(last)[-1].result.finish_reason == "length"
