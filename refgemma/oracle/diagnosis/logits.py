"""Logits of one explanation, run by itself, at the positions that their file has, and beside theirs."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np

from refgemma.numerics import Array
from refgemma.oracle.bounds.arithmetic import Arithmetic, params_in, storage_slack
from refgemma.oracle.bounds.flow import Flow
from refgemma.oracle.bounds.slack import Known
from refgemma.oracle.bugs.port import Chunks, Setup, run
from refgemma.oracle.traces.trace import Trace, of_chunk

_LOGITS = 2**24  # compared at most; of a longer text the last positions


def columns_of(setup: Setup, theirs: Trace) -> Array:
    """Positions that are compared, of any row."""
    B, T = setup.tokens.shape
    if theirs.last:
        return np.unique(np.maximum(_kept(setup, theirs), 0))
    return np.arange(T)[-max(1, _LOGITS // (B * setup.config.vocab_size)) :]


def compared(setup: Setup, theirs: Trace) -> Array:
    """Where there are logits of theirs."""
    columns = columns_of(setup, theirs)
    here: Array = setup.positions[:, columns] >= 0
    if theirs.last:
        here &= (columns[None, :, None] == _kept(setup, theirs)[:, None]).any(axis=-1)
    return here


def difference(theirs: Trace, setup: Setup, ours: Array, computed: str) -> Array:
    """How far their logits are from an explanation's. ours (B, n, V)."""
    columns = columns_of(setup, theirs)
    trace = replace(theirs, tokens=setup.tokens, positions=setup.positions)
    value, _ = of_chunk(trace, "logits", slice(int(columns[0]), int(columns[-1]) + 1))
    value = value[:, columns - columns[0]]
    error = np.maximum(np.abs(value - ours) - storage_slack(value, theirs.dtypes.get("logits", ""), computed), 0)
    error = np.where(compared(setup, theirs)[..., None], error, 0)
    return np.where(np.isfinite(error), error, np.inf)


def logits_of(setup: Setup, a: Arithmetic, columns: Array, *, seed: int | None = None, imitated: bool = False) -> Array:
    """Logits of an explanation: exact, with noise of rounding size, or with every rounding imitated. columns (n,)."""
    setup = setup.but(params=params_in(setup.params, a), numerics=setup.numerics if imitated else a.reference)
    chunks, noise = Chunks(), None if seed is None else _Noise(setup, a, seed)

    def tap(name: str, value: Array) -> Array:
        chunk = chunks.at(name, value)
        if noise is not None:
            value = noise.added(name, value, chunk)
        if name == "final_norm":
            value = value[:, columns[(columns >= chunk.start) & (columns < chunk.stop)] - chunk.start]
            if noise is not None:
                noise.flow.goes_on_with(name, Known(value))
        return value

    return run(setup, tap)


def _kept(setup: Setup, theirs: Trace) -> Array:
    """Columns of the last positions of each row, as many as they kept, (B, kept)."""
    ends = setup.tokens.shape[1] - 1 - (setup.positions[:, ::-1] >= 0).argmax(axis=1)
    kept: Array = ends[:, None] + np.arange(1 - theirs.tensors["logits"].shape[1], 1)
    return kept


class _Noise:
    """Noise of rounding size at every tensor, drawn anew for each name."""

    def __init__(self, setup: Setup, a: Arithmetic, seed: int) -> None:
        self.flow, self._setup, self._seed = Flow(setup.params, setup.config, a), setup, seed

    def added(self, name: str, value: Array, chunk: slice) -> Array:
        """Tensor with its noise."""
        if name == "embed":
            self.flow.next_chunk(self._setup.tokens[:, chunk], self._setup.positions[:, chunk])
        size = np.sqrt(self.flow.bound_of(name, value).variance)
        rng = np.random.default_rng([self._seed, chunk.start, zlib.crc32(name.encode())])
        value = value + rng.standard_normal(value.shape) * size
        self.flow.goes_on_with(name, Known(value))
        return value
