"""A batch whose rows join and leave between two tokens.

One step reads at most a chunk of the waiting prompts, then has every live row write one token in a single pass of the
model. A long prompt is read over many steps, so it delays other rows by at most a chunk. There are no threads here: the
thread that calls `step` owns the model.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TypeAlias

import numpy as np

from refgemma import generation
from refgemma.cache import KVCache, join_rows
from refgemma.errors import InputTypeError
from refgemma.gemma import Gemma
from refgemma.generation import Event, Row, read_prompts
from refgemma.lora.attach import for_rows
from refgemma.model import forward
from refgemma.numerics import Array, namespace_of, to_host
from refgemma.params import Params

OnEvent: TypeAlias = Callable[[Event | Exception], object]


@dataclass(eq=False)
class Request:
    """One prompt on its way to an answer."""

    row: Row  # the prompt and its output so far
    params: Params  # the model with the adapter of this request, for all rows
    on_event: OnEvent  # receives every event, or the exception that ends them
    record: bool = False  # whether events hold decisions
    cancelled: bool = False  # whether the answer is no longer wanted; any thread may set it
    ended: bool = False  # whether its row is free again; set before the last event is delivered
    cache: KVCache | None = None  # its keys and values, from when the prompt is read until the request ends
    place: int = 0  # its row in that cache

    @property
    def slots(self) -> int:
        """Cache slots that it may need."""
        return len(self.row.prompt) + self.row.limit

    def deliver(self, event: Event | Exception) -> None:
        """Deliver an event; the last one after freeing the row, so that its reader can submit again at once.

        A callback that raises cancels its own request only.
        """
        if isinstance(event, Exception) or event.result is not None:
            self.ended, self.cache = True, None
        try:
            if not self.cancelled:
                self.on_event(event)
        except BaseException:  # asyncio's CancelledError is not an Exception, and nothing may end the worker from here
            self.cancelled = True
            logging.getLogger(__name__).exception("on_event raised: its request is cancelled")

    def write(self, scores: Array) -> bool:
        """Write one token from scores (V,); false if the request has ended."""
        if self.cancelled:
            return False
        try:
            event = self.row.next(scores)
        except Exception as error:
            self.deliver(error)
            return False
        # A decision holds several arrays of length V: too much to queue for a slow reader.
        self.deliver(event if self.record else replace(event, decision=None))
        return event.result is None


class Stream(Iterator[Event]):
    """Events of one request, in order, as they arrive; the last holds the result.

    Iterating waits. A stream that is dropped or closed before its end is cancelled: its row leaves the batch before the
    next token. Unread events are kept, so a slow reader delays neither the model nor other readers.

    Parameters
    ----------
    request : Request
        The request in its batch.
    events : SimpleQueue or None
        Where its events arrive; None if they go to a callback.
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
        """Stop the request: no event follows, and a waiting reader is released. Any thread may call it."""
        self._request.cancelled = True
        if self._events is not None:
            self._events.put(None)

    close = cancel

    def __del__(self) -> None:
        # No lock is taken here or in `cancel`, because the garbage collector may call this at any point.
        if self._events is not None:
            self._request.cancelled = True


class Batch:
    """Requests in progress: those whose prompts are being read, and those that write."""

    def __init__(self, gemma: Gemma) -> None:
        self.joining: deque[Request] = deque()  # read in this order; the first may be partly read
        self.live: list[Request] = []  # each writes one token per step
        self._gemma = gemma
        self._own: list[Params] = []  # the tree of each live row
        self._params = gemma.params  # all of them side by side

    def __len__(self) -> int:
        return len(self.joining) + len(self.live)

    def clear(self) -> list[Request]:
        """Drop all requests."""
        dropped = [*self.live, *self.joining]
        self.live.clear()
        self.joining.clear()
        _forget(dropped)
        self._own, self._params = [], self._gemma.params
        return dropped

    def step(self) -> None:
        """Read a chunk, then write one token per row."""
        before = [*self.joining, *self.live]
        self.joining = deque(request for request in self.joining if not request.cancelled)
        self.live = [request for request in self.live if not request.cancelled]
        self._read()
        if self.live:
            self._write()
        if not self.live:
            self._own, self._params = [], self._gemma.params
        _forget(request for request in before if request not in self.live and request not in self.joining)

    def _read(self) -> None:
        """Feed prompts, in the chunks in which each would be fed alone, one chunk in total."""
        gemma, left = self._gemma, generation.CHUNK
        while self.joining:
            request = self.joining[0]
            prompt = request.row.prompt
            try:
                if request.cache is None:
                    xp = namespace_of(request.params["final_norm"])
                    request.cache = KVCache(
                        gemma.config, batch=1, capacity=request.slots, dtype=gemma.numerics.dtype, xp=xp
                    )
                end = min(request.cache.length + generation.CHUNK, len(prompt))
                left -= end - request.cache.length
                if left < 0:
                    return
                scores = read_prompts(
                    request.params, gemma.config, [prompt[:end]], request.cache, [], numerics=gemma.numerics
                )
            except Exception as error:
                self.joining.popleft()
                request.deliver(error)
                continue
            if request.cancelled or end == len(prompt):
                self.joining.popleft()
                if request.write(scores[0]):
                    self.live.append(request)

    def _write(self) -> None:
        gemma = self._gemma
        try:
            cache = self._cache()
            scores = forward(
                self._params,
                gemma.config,
                np.array([[request.row.output[-1]] for request in self.live]),
                positions=np.array([[request.row.position] for request in self.live]),
                cache=cache,
                logits="last",
                numerics=gemma.numerics,
            )
        except Exception as error:
            failed, self.live = self.live, []
            for request in failed:
                failure = RuntimeError(f"the pass in which this answer was being written failed: {error}")
                failure.__cause__ = error
                request.deliver(failure)
            return
        self.live = [request for request, own in zip(self.live, to_host(scores), strict=True) if request.write(own)]

    def _cache(self) -> KVCache:
        """One cache for all live rows, rebuilt when rows have joined or left, as are their parameters."""
        live = self.live
        own = [request.params for request in live]
        if len(own) != len(self._own) or any(a is not b for a, b in zip(own, self._own, strict=True)):
            self._own, self._params = own, for_rows(self._gemma.params, own)
        cache = live[0].cache
        assert cache is not None
        if any(request.cache is not cache for request in live) or len(cache.positions) != len(live):
            capacity = max(request.slots for request in live)
            places = [(request.cache, request.place) for request in live if request.cache is not None]
            cache = join_rows(places, self._gemma.config, capacity=capacity)
            for place, request in enumerate(live):
                request.cache, request.place = cache, place
        return cache


def _forget(ended: Iterable[Request]) -> None:
    """Let go of caches, which rows of a batch share: the stream of an ended request would keep those of all."""
    for request in ended:
        request.cache = None
