"""What comes of one request, for whoever waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue

from refgemma.batching.batch import Request
from refgemma.errors import InputTypeError
from refgemma.generation import Event


class Stream(Iterator[Event]):
    """Events of one request, in order, each as soon as it is there; the last holds the result.

    Iterating waits. A stream that is dropped half-way, or closed, is cancelled: its row leaves the batch before the
    next token. Events that nobody has taken yet are kept, so a slow reader holds up neither the model nor other
    readers.
    """

    def __init__(self, request: Request, events: SimpleQueue[Event | Exception | None] | None) -> None:
        self._request = request
        self._events = events
        self._ended = False

    def __next__(self) -> Event:
        if self._events is None:
            raise InputTypeError("the events of this request go to its on_event: there is nothing to iterate over")
        if self._ended or self._request.cancelled:
            raise StopIteration
        event = self._events.get()
        if event is None:
            raise StopIteration
        if isinstance(event, Exception):
            self._ended = True
            raise event
        self._ended = event.result is not None
        return event

    def cancel(self) -> None:
        """Stop the request; no event follows, and whoever is waiting for one is released. Any thread may call it."""
        self._request.cancelled = True
        if self._events is not None:
            self._events.put(None)

    close = cancel

    def __del__(self) -> None:
        # No lock is taken here or in `cancel`: the garbage collector may call this in the midst of anything.
        if self._events is not None:
            self._request.cancelled = True
