"""A batch whose rows join and leave between two tokens.

One step reads at most a chunk of the prompts that wait, then has every live row write one token in a single pass of
the model. A long prompt is so read over many steps, and holds up nobody by more than a chunk. Nothing here knows of
threads: whoever calls `step` owns the model.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from refgemma import generation
from refgemma.cache import KVCache, join_rows
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

    row: Row  # the prompt, and what has come of it
    params: Params  # the model with the adapter of this request, for all rows
    on_event: OnEvent  # receives every event, or the exception that ends them
    record: bool = False  # whether events hold decisions
    cancelled: bool = False  # whether the answer is no longer wanted; any thread may set it
    ended: bool = False  # whether its row is free again; set before the last event leaves
    cache: KVCache | None = None  # where its keys and values are, from when it is being read until it has ended
    place: int = 0  # which row of that cache

    @property
    def slots(self) -> int:
        """Cache slots it may come to need."""
        return len(self.row.prompt) + self.row.limit

    def tell(self, event: Event | Exception) -> None:
        """Deliver an event, the last one after freeing the row, so that its reader may ask again at once.

        A callback that raises cancels its own request only.
        """
        if isinstance(event, Exception) or event.result is not None:
            self.ended, self.cache = True, None
        try:
            if not self.cancelled:
                self.on_event(event)
        except BaseException:  # asyncio's CancelledError is no Exception, and nothing may end the worker from here
            self.cancelled = True
            logging.getLogger(__name__).exception("on_event raised: its request is cancelled")

    def go_on(self, scores: Array) -> bool:
        """Write one token. scores (V,)."""
        if self.cancelled:
            return False
        try:
            event = self.row.next(scores)
        except Exception as error:
            self.tell(error)
            return False
        # A decision holds several arrays of the vocabulary's length: too much to queue up for a slow reader.
        self.tell(event if self.record else replace(event, decision=None))
        return event.result is None


class Batch:
    """Requests in work: those whose prompts are being read, and those that write."""

    def __init__(self, gemma: Gemma) -> None:
        self.joining: deque[Request] = deque()  # read in this order; the first may be read in part
        self.live: list[Request] = []  # each writes one token a step
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
        """Read a chunk, write a token a row."""
        there = [*self.joining, *self.live]
        self.joining = deque(request for request in self.joining if not request.cancelled)
        self.live = [request for request in self.live if not request.cancelled]
        self._read()
        if self.live:
            self._write()
        if not self.live:
            self._own, self._params = [], self._gemma.params
        _forget(request for request in there if request not in self.live and request not in self.joining)

    def _read(self) -> None:
        """Feed prompts, in the chunks in which each would be fed alone, up to the size of one chunk in all."""
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
                request.tell(error)
                continue
            if request.cancelled or end == len(prompt):
                self.joining.popleft()
                if request.go_on(scores[0]):
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
                request.tell(failure)
            return
        self.live = [request for request, own in zip(self.live, to_host(scores), strict=True) if request.go_on(own)]

    def _cache(self) -> KVCache:
        """One cache for all live rows, made anew where rows came or went; their parameters as well."""
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
