"""What stands behind the routes: the models, one engine for each that is loaded, and the finetunes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from refgemma.batching import Batching, Closed, Full, Stream
from refgemma.gemma import Gemma
from refgemma.generation import Event
from refgemma.lora import Adapter
from refgemma.sampling import SamplingParams
from refgemma.workers_ai.ai import AI
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.request import Request
from refgemma.workers_ai.server.finetune import fits
from refgemma.workers_ai.server.finetunes import Finetunes
from refgemma.workers_ai.server.limits import ROWS, WAITING
from refgemma.workers_ai.server.turns import Turns

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A valid request, ready for an engine."""

    request: Request  # what was asked for
    gemma: Gemma  # the model that answers, without its adapter
    adapter: Adapter | None  # the finetune
    tokens: list[int]  # the prompt
    settings: SamplingParams  # how to sample


class Service:
    """Models, engines and finetunes; may be used from any thread."""

    def __init__(self, ai: AI, finetunes: Finetunes, *, max_rows: int = ROWS, max_waiting: int = WAITING) -> None:
        self.ai = ai  # as given
        self.finetunes = finetunes  # as given
        loaded = {id(gemma): gemma for gemma in ai.models.values()}
        self.closing = False  # whether it was told to stop
        self.turns = Turns(len(loaded) * (max_rows + max_waiting))
        self._engines = {
            key: Batching(gemma, max_rows=max_rows, max_waiting=max_waiting) for key, gemma in loaded.items()
        }

    def prepare(self, model: str, inputs: Any, *, stop: tuple[str, ...] = ()) -> Prepared:
        """Validate a request, and make its prompt."""
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
        """Put a request in the queue of its model."""
        try:
            return self._engines[id(prepared.gemma)].submit(
                prepared.tokens, prepared.settings, adapter=prepared.adapter, record=record, on_event=on_event
            )
        except (Full, Closed) as error:
            raise self.failure(error) from None
        except ValueError as error:
            raise AiError(5006, f"this cannot be run: {error}") from None

    def usable(self, finetune: dict[str, Any], model: str) -> bool:
        """Whether a model can run with a finetune."""
        adapter = self.ai.loras.get(finetune["id"])
        try:
            self.finetunes.check_model(finetune["id"], model)
        except AiError:
            return False
        return adapter is not None and fits(adapter, model, self.ai)

    def close(self, timeout: float) -> None:
        """Take no more requests, and wait for those that are there."""
        self.closing = True
        threads = [threading.Thread(target=engine.close, args=(timeout,)) for engine in self._engines.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def failure(self, error: Exception) -> AiError:
        """What a failure is to whoever asked."""
        if isinstance(error, AiError):
            return error
        if isinstance(error, Full):
            return AiError(3040, "Capacity temporarily exceeded, please try again.")
        if isinstance(error, Closed) and self.closing:
            return AiError(3008, "Request was aborted: the server is stopping")
        log.error("a request failed", exc_info=error)
        return AiError(3043, "Internal server error")
