"""Explanations put to the test by final logits alone: the reference, run by itself.

As in `refgemma.oracle.drift`, the budget is measured: runs in float64 with noise of rounding size at every tensor. Here
the noise goes through the departures, too: a bug may pass it on otherwise than Gemma does.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

from refgemma.checkpoint.load import Progress
from refgemma.numerics import Array
from refgemma.oracle.arithmetic import Arithmetic, arithmetic_of, confidence, params_in
from refgemma.oracle.departures import Chunks, run
from refgemma.oracle.diagnosis import TIE, Cause
from refgemma.oracle.drift import SEEDS, WRONG
from refgemma.oracle.known import Known
from refgemma.oracle.setups import Setup
from refgemma.oracle.steps import Flow
from refgemma.oracle.theirs import fits
from refgemma.oracle.trace import Trace
from refgemma.oracle.trial import with_roundings, with_variants
from refgemma.oracle.variants import Variant

_LOGITS = 2**24  # compared at most; of a longer text the last positions
_MEASURED = 6  # explanations whose budget is measured before one has been found that is inside it


class FreeTrial:
    """Their logits, and what explanations make of them.

    Parameters
    ----------
    theirs : Trace
        With "logits".
    honest : Setup
        The reference as it is.
    arithmetic : str
        What they computed in.
    """

    def __init__(self, theirs: Trace, honest: Setup, arithmetic: str) -> None:
        self._theirs, self._honest, self._name = theirs, honest, arithmetic
        self._budget: float | None = None  # of the honest run, the largest

    def honest(self) -> Cause:
        """How well the reference does as it is.

        Returns
        -------
        Cause
            Of no variants.
        """
        if not fits(self._honest, self._theirs):
            return Cause((), math.inf, math.inf, ("logits",))
        error, ours = self._error(self._honest)
        budgets = self._budgets(self._honest, ours)
        self._budget = float(budgets.max())
        return self._cause((), self._misfit(self._honest), self._over(error, budgets))

    def causes(self, explanations: list[tuple[Variant, ...]], progress: Progress | None = None) -> list[Cause]:
        """How well explanations do.

        Parameters
        ----------
        explanations : list of tuple of Variant
            Each one, or two.
        progress : callable, optional
            ``progress(done, total)``.

        Returns
        -------
        list of Cause
            Closest first; one an explanation. Budgets are measured of those that are closest, of the others taken to be
            that of the honest run.
        """
        setups: list[tuple[float, tuple[Variant, ...], Setup]] = []
        for done, explanation in enumerate(explanations):
            tried = [(self._misfit(setup), setup) for setup in with_variants(self._honest, explanation)]
            misfit, setup = min(tried, key=lambda one: one[0])
            setups.append((misfit, explanation, setup))
            if progress is not None:
                progress(done + 1, len(explanations))
        setups.sort(key=lambda one: one[0])
        found: list[Cause] = []
        for misfit, explanation, setup in setups:
            first = next((cause.misfit for cause in found if cause.explains), None)
            near = len(found) < _MEASURED if first is None else misfit <= TIE * first
            found.append(self._cause(explanation, misfit, self.effect(setup) if near else self._rough(setup)))
        return found

    def may_show(self, variant: Variant) -> bool:
        """Whether a variant could explain the logits.

        Parameters
        ----------
        variant : Variant
            One of the known.

        Returns
        -------
        bool
            False if it feeds another number of tokens than they scored.
        """
        return any(fits(setup, self._theirs) for setup in variant.setups(self._honest))

    def worth_trying(self, pairs: list[tuple[Variant, ...]]) -> list[tuple[Variant, ...]]:
        """Pairs that could explain the logits: all of them.

        Parameters
        ----------
        pairs : list of tuple of Variant
            All that can show together.

        Returns
        -------
        list of tuple of Variant
            Those that feed as many tokens as they scored.
        """
        return [pair for pair in pairs if any(fits(s, self._theirs) for s in with_variants(self._honest, pair))]

    def effect(self, setup: Setup) -> float:
        """Largest difference from their logits over its budget.

        Parameters
        ----------
        setup : Setup
            The explanation.

        Returns
        -------
        float
            Above 1 the explanation is wrong; infinite if it feeds another number of tokens than they scored.
        """
        if not fits(setup, self._theirs):
            return math.inf
        error, ours = self._error(setup)
        return self._over(error, self._budgets(setup, ours))

    def budgets(self, setup: Setup) -> Array:
        """How far rounding may move an explanation's logits.

        Parameters
        ----------
        setup : Setup
            The explanation.

        Returns
        -------
        ndarray, shape (B, n)
            For each position that is compared.
        """
        limit: Array = self._budgets(setup, self._run(setup))[..., 0]
        return limit

    def _cause(self, explanation: tuple[Variant, ...], misfit: float, ratio: float) -> Cause:
        return Cause(explanation, ratio, misfit, () if ratio <= 1 else ("logits",))

    @staticmethod
    def _over(error: Array, budgets: Array) -> float:
        """Largest error over its budget; padding has neither."""
        return float(np.max(error / np.maximum(budgets, 1e-300)))

    def _misfit(self, setup: Setup) -> float:
        """Mean difference over mean magnitude, every rounding imitated."""
        if not fits(setup, self._theirs):
            return math.inf
        error, ours = self._error(setup, imitated=True)
        size = np.abs(ours).mean()
        return float(error.mean() / size) if size and np.isfinite(size) else math.inf

    def _rough(self, setup: Setup) -> float:
        """Largest difference over the largest budget of the honest run."""
        if not fits(setup, self._theirs) or not self._budget:
            return math.inf
        return float(self._error(setup)[0].max() / self._budget)

    def _error(self, setup: Setup, *, imitated: bool = False) -> tuple[Array, Array]:
        """Their difference from an explanation, zero where none is compared, and that one's logits, both (B, n, V)."""
        columns, ours = self._columns(setup), self._run(setup, imitated=imitated)
        compared = setup.positions[:, columns] >= 0
        theirs = self._theirs.tensors["logits"]
        if self._theirs.last:
            compared &= setup.positions[:, columns] == setup.positions.max(axis=1, keepdims=True)
        else:
            theirs = theirs[:, columns]
        error = np.where(compared[..., None], np.abs(np.asarray(theirs, np.float64) - ours), 0)
        return np.where(np.isfinite(error), error, np.inf), ours

    def _budgets(self, setup: Setup, ours: Array) -> Array:
        """Limit of what rounding does to an explanation's logits, (B, n, 1)."""
        spread = np.zeros(ours.shape[:2])
        for seed in SEEDS:
            spread += np.square(self._run(setup, seed) - ours).mean(axis=-1) / len(SEEDS)
        limit: Array = WRONG * confidence(ours.size) * np.sqrt(spread)[..., None]
        return limit

    def _columns(self, setup: Setup) -> Array:
        """Positions that are compared."""
        B, T = setup.tokens.shape
        if self._theirs.last:
            return np.unique(T - 1 - (setup.positions[:, ::-1] >= 0).argmax(axis=1))
        return np.arange(T)[-max(1, _LOGITS // (B * setup.config.vocab_size)) :]

    def _run(self, setup: Setup, seed: int | None = None, *, imitated: bool = False) -> Array:
        """Logits of an explanation, (B, n, V): exact, with noise of rounding size, or with every rounding imitated."""
        a = with_roundings(arithmetic_of(self._name), self._honest.numerics, setup.numerics)
        numerics = setup.numerics if imitated else a.reference
        setup = setup.but(params=params_in(setup.params, a), numerics=numerics)
        columns, chunks = self._columns(setup), Chunks()
        noise = None if seed is None else _Noise(setup, a, seed)

        def tap(name: str, value: Array) -> Array:
            chunk = chunks.at(name, value)
            if noise is not None:
                value = noise.added(name, value, chunk)
            if name == "final_norm":
                here = columns[(columns >= chunk.start) & (columns < chunk.stop)] - chunk.start
                value = value[:, here]
                if noise is not None:
                    noise.flow.goes_on_with(name, Known(value))
            return value

        return run(setup, tap)


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
