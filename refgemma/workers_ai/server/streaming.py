"""Events of an engine's thread, brought to the event loop, and from there to a client for as long as there is one.

Nothing here waits for a client but that client's own task: an engine puts its events on a queue that holds a whole
answer, and goes on. A client that is gone is noticed by the server's `http.disconnect`, whether something is being sent
to it or not, and its request is cancelled, which stops it before its next token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

from starlette.types import Message, Receive, Scope, Send

from refgemma.generation import Event, Generation
from refgemma.workers_ai.ai import blamed
from refgemma.workers_ai.answer import sse
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.server.service import Prepared, Service

T = TypeVar("T")
OnEvent: TypeAlias = Callable[[Event | Exception], object]


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Answer:
    """Events of one request, in the event loop."""

    def __init__(self, service: Service, prepared: Prepared, *, record: bool = False) -> None:
        self.prepared = prepared
        self._service = service
        self._record = record
        self._queue: asyncio.Queue[Event | Exception] = asyncio.Queue()

    async def start(self) -> Answer:
        """Put the request in the queue of its model."""
        # In a thread, since an adapter may have to be put on the model first.
        on_event = _onto(self._queue, asyncio.get_running_loop())
        self._stream = await asyncio.to_thread(self._service.submit, self.prepared, on_event, record=self._record)
        return self

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            event = await self._queue.get()
            if isinstance(event, Exception):
                raise self._service.failure(blamed(event, self.prepared.request))
            yield event
            if event.result is not None:
                return

    async def result(self) -> Generation:
        """Wait for the end."""
        async for event in self:
            result = event.result
        assert result is not None  # the last event has it
        return result

    def cancel(self) -> None:
        """Stop the request before its next token."""
        self._stream.cancel()


def _onto(queue: asyncio.Queue[Event | Exception], loop: asyncio.AbstractEventLoop) -> OnEvent:
    """Callback for an engine's thread; it holds no `Answer`, which holds it: a cycle would keep caches for long."""

    def on_event(event: Event | Exception) -> None:
        if isinstance(event, Event) and event.decision is not None:
            event = replace(event, decision=None)  # arrays that can be worked out again from the logits
        loop.call_soon_threadsafe(queue.put_nowait, event)

    return on_event


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Work for a client until it is done or the client is gone."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def after_last(send: Send, release: Callable[[], object]) -> Send:
    """`send` that calls `release` in the same step of the event loop that sends the last bytes of a response.

    A client that has read them may ask again at once, and must then find the place of its answered request free. What
    runs when the application returns is too late: the next request may be read first.
    """

    async def sending(message: Message) -> None:
        await send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            release()

    return sending


class EventStream:
    """A response of server-sent events.

    No ``[DONE]`` follows a failure: clients take such a stream for cut off, which it is.
    """

    def __init__(
        self,
        answer: Answer,
        body: AsyncIterator[bytes],
        last_words: Callable[[AiError], dict[str, Any]] = AiError.envelope,
    ) -> None:
        self._answer = answer
        self._body = body
        self._last_words = last_words

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await while_connected(receive, self._send_all(send))
        except ClientGone:
            pass
        finally:
            self._answer.cancel()

    async def _send_all(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for data in self._body:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except AiError as error:
            await send({"type": "http.response.body", "body": sse(self._last_words(error)), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
