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
    """A valid request, ready for an engine.

    Attributes
    ----------
    request : Request
        What was asked for.
    gemma : Gemma
        The model that answers, without its adapter.
    adapter : Adapter or None
        The finetune.
    tokens : list of int
        The prompt.
    settings : SamplingParams
        How to sample.
    """

    request: Request
    gemma: Gemma
    adapter: Adapter | None
    tokens: list[int]
    settings: SamplingParams


class Service:
    """Models, engines and finetunes; may be used from any thread.

    Parameters
    ----------
    ai : AI
        Models and adapters by name.
    finetunes : Finetunes
        Adapters that users upload, and where they are kept.
    max_rows : int
        Requests that write at a time, of each loaded model.
    max_waiting : int
        Requests that may wait beside those.

    Attributes
    ----------
    ai : AI
        As given.
    finetunes : Finetunes
        As given.
    turns : Turns
        Where requests are read and prepared; as many at a time as the engines take.
    closing : bool
        Whether it was told to stop.
    """

    def __init__(self, ai: AI, finetunes: Finetunes, *, max_rows: int = ROWS, max_waiting: int = WAITING) -> None:
        self.ai = ai
        self.finetunes = finetunes
        loaded = {id(gemma): gemma for gemma in ai.models.values()}
        self.closing = False
        self.turns = Turns(len(loaded) * (max_rows + max_waiting))
        self._engines = {
            key: Batching(gemma, max_rows=max_rows, max_waiting=max_waiting) for key, gemma in loaded.items()
        }

    def prepare(self, model: str, inputs: Any, *, stop: tuple[str, ...] = ()) -> Prepared:
        """Validate a request, and make its prompt.

        Parameters
        ----------
        model : str
            Hosted name.
        inputs : object
            The body.
        stop : tuple of str
            Texts that end the answer, which the hosted schema has no field for.

        Returns
        -------
        Prepared
            For `submit`.

        Raises
        ------
        AiError
            If it is not valid, or names a finetune that is not there, not complete or not for this model.
        """
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
        """Put a request in the queue of its model.

        Parameters
        ----------
        prepared : Prepared
            From `prepare`.
        on_event : callable
            Told every event, as `Batching.submit` has it.
        record : bool
            Whether events are to hold the logits.

        Returns
        -------
        Stream
            To cancel.

        Raises
        ------
        AiError
            3040, if as many wait as may wait, or the server is about to stop; 5006, if the adapter cannot be used.
        """
        try:
            return self._engines[id(prepared.gemma)].submit(
                prepared.tokens, prepared.settings, adapter=prepared.adapter, record=record, on_event=on_event
            )
        except (Full, Closed) as error:
            raise self.failure(error) from None
        except ValueError as error:
            raise AiError(5006, f"this cannot be run: {error}") from None

    def usable(self, finetune: dict[str, Any], model: str) -> bool:
        """Whether a model can run with a finetune.

        Parameters
        ----------
        finetune : dict
            From `Finetunes.every`.
        model : str
            Hosted name.

        Returns
        -------
        bool
            Whether it is complete, for this model, and fits what answers here.
        """
        adapter = self.ai.loras.get(finetune["id"])
        try:
            self.finetunes.check_model(finetune["id"], model)
        except AiError:
            return False
        return adapter is not None and fits(adapter, model, self.ai)

    def close(self, timeout: float) -> None:
        """Take no more requests, and wait for those that are there.

        Parameters
        ----------
        timeout : float
            Seconds after which the rest is dropped, with an error that says so.
        """
        self.closing = True
        threads = [threading.Thread(target=engine.close, args=(timeout,)) for engine in self._engines.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def failure(self, error: Exception) -> AiError:
        """What a failure is to whoever asked.

        Parameters
        ----------
        error : Exception
            From an engine, or what nobody expected.

        Returns
        -------
        AiError
            Itself if it is one; 3040 where there was no room, 3008 where the server stops, 3043 for all else, which
            goes to the log.
        """
        if isinstance(error, AiError):
            return error
        if isinstance(error, Full):
            return AiError(3040, "Capacity temporarily exceeded, please try again.")
        if isinstance(error, Closed) and self.closing:
            return AiError(3008, "Request was aborted: the server is stopping")
        log.error("a request failed", exc_info=error)
        return AiError(3043, "Internal server error")
