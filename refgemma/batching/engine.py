"""Requests from any number of threads, answered by one that owns the model.

The worker takes requests in order of arrival, as rows of its batch become free, and lives as long as there is work: an
idle engine has no thread and need not be closed. State that other threads share with the worker is protected by one
lock, which is never held during a pass of the model or while a callback runs.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from types import TracebackType
from weakref import WeakKeyDictionary

from refgemma.batching.batch import Batch, OnEvent, Request, Stream
from refgemma.errors import InputError
from refgemma.gemma import Gemma
from refgemma.generation import Event, Row
from refgemma.lora import Adapter
from refgemma.lora.attach import for_rows
from refgemma.params import Params
from refgemma.sampling import SamplingParams


class Full(RuntimeError):
    """The waiting line is full: try again later."""


class Closed(RuntimeError):
    """The engine no longer takes requests, or dropped this one when it stopped."""


class Batching:
    """Concurrent requests over one model, each with its own settings and adapter.

    Every answer is the same as if its request ran alone, up to the first decision so close that rounding decides it.
    Leaving a ``with`` block waits for all answers; leaving it by an exception stops them.

    Parameters
    ----------
    gemma : Gemma
        The model; its own adapters apply to every request.
    max_rows : int
        Requests at work at a time; the cache may grow to hold as many contexts.
    max_waiting : int
        Requests that may wait beside those.

    Examples
    --------
    >>> import refgemma
    >>> from refgemma.batching import Batching
    >>> gemma = refgemma.load("tiny-it")
    >>> settings = refgemma.SamplingParams(temperature=0, max_tokens=20)
    >>> with Batching(gemma) as engine:
    ...     streams = [engine.submit(gemma.encode_prompt(f"What is {n} + 25?"), settings) for n in (17, 18)]
    ...     answers = ["".join(event.text for event in stream) for stream in streams]
    >>> answers
    ['17 + 25 = 42.', '18 + 25 = 43.']
    """

    def __init__(self, gemma: Gemma, *, max_rows: int = 8, max_waiting: int = 64) -> None:
        for name, value, least in (("max_rows", max_rows, 1), ("max_waiting", max_waiting, 0)):
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}: expected a whole number, {least} or more")
        if any(on.rows is not None for on in gemma.adapters):
            raise InputError("the model has an adapter for some rows of a batch: give adapters with the requests")
        self.gemma = gemma
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self._batch = Batch(gemma)  # the worker's own
        self._lock = threading.Lock()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # rows of the batch at the worker's last step; some may have ended since
        self._worker: threading.Thread | None = None
        self._working = False
        self._closed = False
        self._deadline = math.inf
        self._adapted: WeakKeyDictionary[Adapter, Params] = WeakKeyDictionary()
        self._adapting = threading.Lock()

    def __repr__(self) -> str:
        with self._lock:
            state = f"{self._rows_taken()} of {self.max_rows} rows at work, {len(self._waiting)} waiting"
        return f"Batching: {state}{', closed' if self._closed else ''}"

    def submit(
        self,
        prompt: Sequence[int],
        settings: SamplingParams,
        *,
        adapter: Adapter | None = None,
        record: bool = False,
        on_event: OnEvent | None = None,
    ) -> Stream:
        """Queue a request for an answer.

        Parameters
        ----------
        prompt : sequence of int
            Token ids, as from `Gemma.encode_prompt`.
        settings : SamplingParams
            How tokens are chosen.
        adapter : Adapter, optional
            For this request alone, on top of the model's own.
        record : bool
            Whether events hold decisions, and the result every decision with its logits.
        on_event : callable, optional
            ``on_event(event)`` receives every event instead of the stream: in an asyncio program, pass it on with
            ``loop.call_soon_threadsafe``. The worker calls it and waits for it, so it should return at once. If the
            request fails it receives the exception, last; after `Stream.cancel` it receives nothing.

        Returns
        -------
        Stream
            To iterate over, and to cancel.

        Raises
        ------
        ValueError
            If the prompt is empty or too long, or the adapter does not fit the model, or holds a weight trained whole.
        Full
            If too many requests are waiting.
        Closed
            After `close`, or when the worker has died of an error.
        """
        params = self._params(adapter)
        row = Row(0, prompt, settings, self.gemma, record)
        events: SimpleQueue[Event | Exception | None] | None = None
        if on_event is None:
            events = SimpleQueue()
            on_event = events.put
        request = Request(row, params, on_event, record)
        with self._lock:
            if self._closed:
                raise Closed("this engine was closed: it takes no more requests")
            self._sweep()
            # Free rows count as well, even those that the worker has not filled yet.
            if len(self._waiting) >= self.max_waiting + self.max_rows - self._rows_taken():
                raise Full(f"{self.max_rows} requests are in work and {self.max_waiting} wait: come again later")
            if not self._working:
                # Not a daemon, which might be cut off inside BLAS; at the end of the program it stops by itself.
                self._worker = threading.Thread(target=self._work, name="refgemma-batching")
                self._worker.start()  # its first act is to wait for this lock
                self._working = True
            self._waiting.append(request)
        return Stream(request, events)

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, and wait until the present ones have finished.

        Parameters
        ----------
        timeout : float, optional
            Seconds after which unfinished requests are stopped.
        """
        with self._lock:
            self._closed = True
            if timeout is not None:
                self._deadline = min(self._deadline, time.monotonic() + timeout)
            worker = self._worker
        if worker is not None and worker is not threading.current_thread():
            worker.join()

    def __enter__(self) -> Batching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(None if kind is None else 0)

    def _params(self, adapter: Adapter | None) -> Params:
        """The model with an adapter; computed once for each adapter, for as long as that is in use."""
        if adapter is None:
            return self.gemma.params
        with self._adapting:
            params = self._adapted.get(adapter)
            if params is None:
                params = self.gemma.with_lora(adapter).params
                for_rows(self.gemma.params, [self.gemma.params, params])  # raises here what cannot share a batch
                self._adapted[adapter] = params
            return params

    def _rows_taken(self) -> int:
        return sum(not (request.ended or request.cancelled) for request in self._running)

    def _sweep(self) -> None:
        self._waiting = deque(request for request in self._waiting if not request.cancelled)

    def _work(self) -> None:
        try:
            while self._take():
                self._batch.step()
        except BaseException as error:
            reason = f"the worker of this engine died: {type(error).__name__}: {error}"
            self._stop(lambda: Closed(reason))
            raise

    def _take(self) -> bool:
        """Let requests into the batch; true if there is anything to do."""
        program_ends = not threading.main_thread().is_alive()
        with self._lock:
            stop = program_ends or time.monotonic() >= self._deadline
            if not stop:
                self._sweep()
                while self._waiting and len(self._batch) < self.max_rows:
                    self._batch.joining.append(self._waiting.popleft())
                self._running = [*self._batch.joining, *self._batch.live]
                self._working = bool(self._running)
                return self._working
        self._stop(lambda: Closed("the engine was closed before this answer was finished"))
        return False

    def _stop(self, reason: Callable[[], Exception]) -> None:
        with self._lock:
            self._closed = True
            requests = [*self._batch.clear(), *self._waiting]
            self._waiting.clear()
            self._running, self._working = [], False
        for request in requests:
            request.deliver(reason())
