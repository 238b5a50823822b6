"""Events from an engine's thread, passed to the event loop and on to the client while it is connected.

Only a client's own task ever waits for that client: the engine puts events on a queue that can hold a whole answer.
When `http.disconnect` reports that a client has gone, its request is cancelled and stops before its next token.
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
    """The client has disconnected."""


class Answer:
    """Events of one request, in the event loop."""

    def __init__(self, service: Service, prepared: Prepared, *, record: bool = False) -> None:
        self.prepared = prepared
        self._service = service
        self._record = record
        self._queue: asyncio.Queue[Event | Exception] = asyncio.Queue()

    async def start(self) -> Answer:
        """Queue the request for its model."""
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

    async def result(self, receive: Receive) -> Generation:
        """Await the whole answer; cancel it if the client disconnects."""
        try:
            return await while_connected(receive, self._result())
        finally:
            self.cancel()

    async def _result(self) -> Generation:
        async for event in self:
            result = event.result
        assert result is not None  # the last event has it
        return result

    def cancel(self) -> None:
        """Stop the request before its next token."""
        self._stream.cancel()


def _onto(queue: asyncio.Queue[Event | Exception], loop: asyncio.AbstractEventLoop) -> OnEvent:
    """Make the callback for the engine's thread, without a reference cycle, which would keep caches in memory."""

    def on_event(event: Event | Exception) -> None:
        if isinstance(event, Event) and event.decision is not None:
            event = replace(event, decision=None)  # its arrays can be computed again from the logits
        loop.call_soon_threadsafe(queue.put_nowait, event)

    return on_event


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await work until it is done; raise `ClientGone` if the client disconnects first."""
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
    """Return a `send` that calls `release` in the same step of the event loop that sends a response's last bytes.

    A client that has read them may send another request at once, which must find a free place. Releasing when the
    application returns would be too late: the next request may be read first.
    """

    async def sending(message: Message) -> None:
        await send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            release()

    return sending


class EventStream:
    """A response of server-sent events.

    After a failure there is no ``[DONE]``, so that clients see that the stream was cut off.
    """

    def __init__(
        self,
        answer: Answer,
        body: AsyncIterator[bytes],
        error_event: Callable[[AiError], dict[str, Any]] = AiError.envelope,
    ) -> None:
        self._answer = answer
        self._body = body
        self._error_event = error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
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
            await send({"type": "http.response.body", "body": sse(self._error_event(error)), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
