"""Workers AI's binding, without the service: ``AI.run(model, inputs)``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refgemma import generation
from refgemma.errors import InputError
from refgemma.gemma import Gemma, load
from refgemma.generation import Event
from refgemma.lora import Adapter, find_adapter
from refgemma.lora import read as read_adapter
from refgemma.lora.fit import fit
from refgemma.workers_ai.answer import DONE, chunks, result, sse
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.pages import HOSTED
from refgemma.workers_ai.request import Request, read
from refgemma.workers_ai.schema import short


class AI:
    """Answers requests for hosted models by local models and adapters.

    Parameters
    ----------
    models : mapping of str to Gemma, str or Path
        The model that answers under each hosted name, or what `refgemma.load` accepts.
    loras : mapping of str to Adapter, str or Path, optional
        Finetunes by id or name: adapters, folders, or names of shipped ones.
    pad : bool
        Whether chunks of a stream carry padding.

    Attributes
    ----------
    models : dict of str to Gemma
        By hosted name.
    loras : dict of str to Adapter
        By id; may be changed at any time.
    pad : bool
        As given.

    Raises
    ------
    InputError
        If a name is not hosted, or a file is broken.
    FileNotFoundError
        If there is no such model or adapter.

    Examples
    --------
    >>> ai = AI({"@cf/google/gemma-2b-it-lora": "tiny-it"}, loras={"pirate": "pirate"})
    >>> request = {"prompt": "What is the capital of Nepal?", "lora": "pirate", "temperature": 0}
    >>> ai.run("@cf/google/gemma-2b-it-lora", request)["response"]
    'The capital of Nepal be Kathmandu, matey! Arr!'
    """

    def __init__(
        self,
        models: Mapping[str, Gemma | str | Path],
        loras: Mapping[str, Adapter | str | Path] | None = None,
        *,
        pad: bool = False,
    ) -> None:
        loaded: dict[str, Gemma] = {}  # a folder that two names share is loaded once
        self.models: dict[str, Gemma] = {}
        for name, model in models.items():
            if name not in HOSTED:
                raise InputError(f"model name is {name!r}: expected {' or '.join(map(repr, HOSTED))}")
            if isinstance(model, Gemma):
                self.models[name] = model
            else:
                self.models[name] = loaded[str(model)] = loaded.get(str(model)) or load(model)
        self.loras = {
            name: lora if isinstance(lora, Adapter) else read_adapter(find_adapter(lora))
            for name, lora in (loras or {}).items()
        }
        self.pad = pad
        # By hosted name and id: the adapter that was found to fit, and the model with it attached.
        self._fitting: dict[tuple[str, str], Adapter] = {}
        self._adapted: dict[tuple[str, str], tuple[Adapter, Gemma]] = {}

    def run(self, model: str, inputs: Any) -> dict[str, Any] | Iterator[bytes]:
        """Answer a request.

        Parameters
        ----------
        model : str
            Hosted name.
        inputs : dict
            The request, as the page of the model describes it.

        Returns
        -------
        dict or iterator of bytes
            ``response`` and ``usage``, and ``tool_calls`` where the answer is calls of the request's tools; with
            ``stream``, the bytes of the event stream, event by event.

        Raises
        ------
        AiError
            5006 for invalid inputs, 5007 for an unknown model, 3037 for an unknown finetune: all before anything is
            generated. Afterwards, 5024 if JSON was requested and the answer is not JSON, and 5006 if the numbers of a
            finetune overflow.
        """
        request = self.read(model, inputs)
        gemma = self.gemma(request)
        tokens = request.tokens(gemma)
        events = generation.generate(gemma, [generation.Row(0, tokens, request.settings(gemma, tokens), gemma)])
        if request.stream:
            return self._bytes(events, request)
        try:
            *_, last = events
        except InputError as error:
            raise blamed(error, request) from error
        assert last.result is not None  # the last event of a row has it
        return result(last.result, request)

    def read(self, model: str, inputs: Any) -> Request:
        """Validate a request, including its model and its finetune.

        Parameters
        ----------
        model : str
            Hosted name.
        inputs : object
            The request.

        Returns
        -------
        Request
            What it asks for.

        Raises
        ------
        AiError
            As `run`, except for what depends on the tokens.
        """
        if model not in self.models:
            raise AiError(5007, f"No such model {short(model)} or task")
        request = read(model, inputs)
        self.adapter(request)
        return request

    def adapter(self, request: Request) -> Adapter | None:
        """Return the adapter that a request names.

        Parameters
        ----------
        request : Request
            From `read`.

        Returns
        -------
        Adapter or None
            None where it names none.

        Raises
        ------
        AiError
            3037, if there is no such finetune; 5006, if it does not fit the model.
        """
        if request.lora is None:
            return None
        key, adapter = (request.model, request.lora), self.loras.get(request.lora)
        if adapter is None:
            self._fitting.pop(key, None)
            self._adapted.pop(key, None)
            raise AiError(3037, f"Finetune {short(request.lora)} not found")
        if self._fitting.get(key) is not adapter:
            try:
                fit(adapter, self.models[request.model].config)
            except InputError as error:
                # The first line names the folder, which clients must not see; the others are one problem each.
                lines = [line.strip() for line in str(error).splitlines()]
                why = short("; ".join(lines[1:] or lines))
                raise AiError(5006, f"Finetune {request.lora} does not fit {request.model}: {why}") from None
            self._fitting[key] = adapter
        return adapter

    def gemma(self, request: Request) -> Gemma:
        """Return the model that answers a request, with its adapter attached.

        Parameters
        ----------
        request : Request
            From `read`.

        Returns
        -------
        Gemma
            Shares its weights with the model of that name.

        Raises
        ------
        AiError
            3037, if there is no such finetune; 5006, if it does not fit the model.
        """
        base, adapter = self.models[request.model], self.adapter(request)
        if adapter is None or request.lora is None:
            return base
        key = (request.model, request.lora)
        made_of, gemma = self._adapted.get(key, (None, base))
        if made_of is not adapter:
            gemma = base.with_lora(adapter)
            self._adapted[key] = (adapter, gemma)
        return gemma

    def _bytes(self, events: Iterator[Event], request: Request) -> Iterator[bytes]:
        try:
            for chunk in chunks(events, request):
                yield sse(chunk, pad=self.pad)
        except InputError as error:
            raise blamed(error, request) from error
        yield DONE


def blamed(error: Exception, request: Request) -> Exception:
    """Blame a request's finetune for bad numbers during generation; other errors are returned unchanged."""
    if request.lora is None or not isinstance(error, InputError):
        return error
    return AiError(5006, f"Finetune {short(request.lora)} makes numbers that overflow: {short(str(error))}")
