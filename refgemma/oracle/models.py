"""What a comparison starts from: the model's weights as stored, and traces, of refgemma or of another engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from refgemma.config import Config
from refgemma.device import placed
from refgemma.errors import InputError
from refgemma.gemma import Gemma, LoraNames, load
from refgemma.oracle.foreign.reader import read_foreign
from refgemma.oracle.formula_models import formula
from refgemma.oracle.traces.trace import Trace, is_trace, read_trace_file
from refgemma.params import Params


def weights_of(model: Gemma | str | Path, lora: LoraNames = ()) -> tuple[Params, Config]:
    """Weights and configuration of a model: loaded, of a folder or name, or a formula model."""
    known = formula.find(model) if isinstance(model, str) else None
    if lora and (known is not None or isinstance(model, Gemma)):
        raise InputError(
            "adapters can be added only to a model given by folder or name: give a loaded model with its adapters on"
        )
    if known is not None:
        return known.params, known.config
    if isinstance(model, Gemma):
        return placed(model.params, np), model.config
    try:
        gemma = load(model, numerics="float64", weights="bfloat16", lora=lora)
    except ValueError:  # stored in another format; if that is not why, this says the same again
        gemma = load(model, numerics="float64", lora=lora)
    return gemma.params, gemma.config


def read_trace(path: str | Path, *, config: Config | None = None, mapping: Mapping[str, str] | None = None) -> Trace:
    """Read a trace.

    Parameters
    ----------
    path : str or Path
        What `Trace.save` wrote, or another engine's file, see `refgemma.oracle.foreign.reader.read_foreign`.
    config : Config, optional
        The model; needed for another engine's file.
    mapping : mapping of str to str, optional
        Names in the file to names of the reference.

    Returns
    -------
    Trace
        Its tensors are read on access.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, or its tensors do not fit the model.
    """
    if not Path(path).is_file() or is_trace(path):
        return read_trace_file(path, config)
    if config is None:
        raise InputError(f"{path} is not a trace written by refgemma: give the config of the model it belongs to")
    return read_foreign(path, config, mapping=mapping)


def read_candidate(
    path: str | Path,
    model: Gemma | str | Path | None,
    config: Config,
    *,
    mapping: Mapping[str, str] | None = None,
    tokens: ArrayLike | None = None,
    positions: ArrayLike | None = None,
) -> Trace:
    """Read what is to be judged; tokens of a formula model are known."""
    if is_trace(path):
        return read_trace_file(path, config)
    known = formula.find(model) if isinstance(model, str) else None
    if tokens is None and known is not None:
        tokens, positions = known.tokens, known.positions
    return read_foreign(path, config, mapping=mapping, tokens=tokens, positions=positions)
