"""Threads for work that takes a stranger's request apart, before any queue of a model has it.

Such work is short for what people send, and as long as the limits allow for what is made to be long. Hence the bound:
who comes while as many requests wait here as may wait for a model is told to come again, and nothing piles up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from refgemma.workers_ai.errors import AiError

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4  # which share one interpreter: more would only take from those that generate


class Turns:
    """Threads, and a queue with a bound before them."""

    def __init__(self, most: int) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "refgemma-prepare")
        self._places = threading.BoundedSemaphore(most)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do work in its turn."""
        if not self._places.acquire(blocking=False):
            raise AiError(3040, "Capacity temporarily exceeded, please try again.")
        try:
            future = self._pool.submit(work, *args, **kwargs)
        except RuntimeError:  # the threads are gone
            self._places.release()
            raise AiError(3008, "Request was aborted: the server is stopping") from None
        # With the work, and not with whoever waits for it, who may be gone before.
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Take no more work."""
        self._pool.shutdown(wait=False, cancel_futures=True)
