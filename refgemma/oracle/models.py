"""The model that a trace is judged by: its weights as they are stored, and another engine's file read with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from refgemma.config import Config
from refgemma.device import placed
from refgemma.errors import InputError
from refgemma.gemma import Gemma, LoraNames, load
from refgemma.model import Params
from refgemma.oracle.foreign.reader import read_foreign
from refgemma.oracle.formula_models import formula
from refgemma.oracle.traces.file import is_trace
from refgemma.oracle.traces.trace import Trace, read_trace


def weights_of(model: Gemma | str | Path, lora: LoraNames = ()) -> tuple[Params, Config]:
    """Weights and configuration of a model."""
    known = formula.find(model) if isinstance(model, str) else None
    if lora and (known is not None or isinstance(model, Gemma)):
        raise InputError("adapters are put on a model by its folder or name only: give it with them on")
    if known is not None:
        return known.params, known.config
    if isinstance(model, Gemma):
        return placed(model.params, np), model.config
    try:
        gemma = load(model, numerics="float64", weights="bfloat16", lora=lora)
    except ValueError:  # stored in another format; if that is not why, this says the same again
        gemma = load(model, numerics="float64", lora=lora)
    return gemma.params, gemma.config


def read_theirs(
    path: str | Path,
    model: Gemma | str | Path | None,
    config: Config,
    *,
    mapping: Mapping[str, str] | None = None,
    tokens: ArrayLike | None = None,
    positions: ArrayLike | None = None,
) -> Trace:
    """Read what another engine computed."""
    if is_trace(path):
        return read_trace(path, config=config)
    known = formula.find(model) if isinstance(model, str) else None
    if tokens is None and known is not None:
        tokens, positions = known.tokens, known.positions
    ids, places = (None if array is None else np.atleast_2d(np.asarray(array)) for array in (tokens, positions))
    return read_foreign(path, config, mapping=mapping, tokens=ids, positions=places)
