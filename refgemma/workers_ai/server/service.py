"""The models, one engine for each, the finetunes, and the threads that prepare requests for the engines."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

from refgemma.batching import Batching, Closed, Full, Stream
from refgemma.errors import InputError
from refgemma.gemma import Gemma
from refgemma.generation import Event
from refgemma.lora import Adapter
from refgemma.sampling import SamplingParams
from refgemma.workers_ai.ai import AI
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.request import Request
from refgemma.workers_ai.server.adapter_check import fits
from refgemma.workers_ai.server.finetunes import Finetunes
from refgemma.workers_ai.server.limits import ROWS, WAITING

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4  # they share the interpreter with generation: more would only slow it down
FULL = "Capacity temporarily exceeded, please try again."
STOPPING = "Request was aborted: the server is stopping"


class PreparationPool:
    """Threads that parse and validate requests before an engine gets them, with a bounded queue.

    This work is short for ordinary requests, and as long as the limits allow for malicious ones. When as many requests
    wait here as may wait for the models, further ones are refused.
    """

    def __init__(self, most: int) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "refgemma-prepare")
        self._places = threading.BoundedSemaphore(most)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do work on one of the threads."""
        if not self._places.acquire(blocking=False):
            raise AiError(3040, FULL)
        try:
            future = self._pool.submit(work, *args, **kwargs)
        except RuntimeError:  # the pool is closed
            self._places.release()
            raise AiError(3008, STOPPING) from None
        # Released when the work ends, which may be after its client has gone.
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Take no more work."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A valid request, ready for an engine."""

    request: Request
    gemma: Gemma  # without the adapter
    adapter: Adapter | None
    tokens: list[int]  # the prompt
    settings: SamplingParams


class Service:
    """Models, engines and finetunes; may be used from any thread."""

    def __init__(self, ai: AI, finetunes: Finetunes, *, max_rows: int = ROWS, max_waiting: int = WAITING) -> None:
        self.ai = ai
        self.finetunes = finetunes
        loaded = {id(gemma): gemma for gemma in ai.models.values()}
        self.closing = False
        self.preparation = PreparationPool(len(loaded) * (max_rows + max_waiting))
        self._engines = {
            key: Batching(gemma, max_rows=max_rows, max_waiting=max_waiting) for key, gemma in loaded.items()
        }

    def prepare(self, model: str, inputs: Any, *, stop: tuple[str, ...] = ()) -> Prepared:
        """Validate a request and encode its prompt."""
        try:
            request = self.ai.read(model, inputs)
        except AiError as error:
            if error.code == 3037:
                self.finetunes.check_complete(inputs["lora"])
            raise
        self.finetunes.check_model(request.lora, model)
        gemma = self.ai.models[model]
        tokens = request.tokens(gemma)
        settings = request.settings(gemma, tokens)
        adapter = self.ai.adapter(request)
        settings = replace(settings, stop=stop) if stop else settings
        return Prepared(request=request, gemma=gemma, adapter=adapter, tokens=tokens, settings=settings)

    def submit(
        self, prepared: Prepared, on_event: Callable[[Event | Exception], object], *, record: bool = False
    ) -> Stream:
        """Queue a request for its model."""
        try:
            return self._engines[id(prepared.gemma)].submit(
                prepared.tokens, prepared.settings, adapter=prepared.adapter, record=record, on_event=on_event
            )
        except (Full, Closed) as error:
            raise self.failure(error) from None
        except InputError as error:
            raise AiError(5006, f"this cannot be run: {error}") from None

    def usable(self, finetune: dict[str, Any], model: str) -> bool:
        """Return whether a model can run with a finetune."""
        adapter = self.ai.loras.get(finetune["id"])
        try:
            self.finetunes.check_model(finetune["id"], model)
        except AiError:
            return False
        return adapter is not None and fits(adapter, self.ai.models[model])

    def close(self, timeout: float) -> None:
        """Accept no more requests, and wait for those in progress."""
        self.closing = True
        threads = [threading.Thread(target=engine.close, args=(timeout,)) for engine in self._engines.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def failure(self, error: Exception) -> AiError:
        """Translate a failure into the error that the client gets."""
        if isinstance(error, AiError):
            return error
        if isinstance(error, Full):
            return AiError(3040, FULL)
        if isinstance(error, Closed) and self.closing:
            return AiError(3008, STOPPING)
        log.error("a request failed", exc_info=error)
        return AiError(3043, "Internal server error")
