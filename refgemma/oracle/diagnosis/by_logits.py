"""Explanations put to the test by final logits alone: the reference, run by itself.

As in `refgemma.oracle.judging.free_run`, the budget is measured: runs in float64 with noise of rounding size at every tensor. Here
the noise goes through the departures, too: a bug may pass it on otherwise than Gemma does.

To be inside its budget is not enough for an explanation, since some bugs have large ones. It must come clearly closer
to their logits than the reference does, and two bugs closer than either of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from refgemma.checkpoint.load import Progress
from refgemma.numerics import Array
from refgemma.oracle.bounds.arithmetic import arithmetic_of, confidence
from refgemma.oracle.bugs.catalogue import Bug, with_bugs
from refgemma.oracle.bugs.port import Setup
from refgemma.oracle.diagnosis.candidate import fits
from refgemma.oracle.diagnosis.explanation import with_roundings
from refgemma.oracle.diagnosis.logits import columns_of, compared, difference, logits_of
from refgemma.oracle.diagnosis.result import TIE, Cause
from refgemma.oracle.judging.thresholds import DRIFTED, SEEDS
from refgemma.oracle.traces.trace import Trace

# Times less misfit than without, and it is no coincidence. Measured where it is hardest, with roundings that fall
# either way in every layer, the right explanation is 12 times closer or more, a related one up to 1.4 times.
CLOSER = 4.0
_MEASURED = 6  # explanations whose budget is measured before one has been found that is inside it
_REACH = 10.0  # times its own effect, that a bug moves logits by beside another one


@dataclass(frozen=True, eq=False)
class _Imitated:
    """An explanation's logits with every rounding imitated.

    Differences are means over the mean magnitude. The misfit is of the positions that are to be explained, the mean of
    its logarithms: where roundings fall either way some of these are far off even with the right explanation, and some
    are exact; with a wrong one none is.
    """

    misfit: float  # from theirs
    moved: float  # from the reference's
    rough: float  # largest difference from theirs over the largest budget of the reference
    setup: Setup


class FreeTrial:
    """Their logits, and what explanations make of them."""

    def __init__(self, theirs: Trace, honest: Setup, arithmetic: str) -> None:
        self._theirs, self._honest, self._name = theirs, honest, arithmetic
        self._unit = arithmetic_of(arithmetic).unit
        self._budget: float | None = None  # of the honest run, the largest
        self._wrong: Array | None = None  # positions at which it is outside, (B, n)
        self._plain = math.inf  # its misfit
        self._reference: Array | None = None  # its logits, every rounding imitated
        self._alone: dict[str, float] = {}  # by key: misfit of one bug
        self._moves: dict[str, float] = {}  # by key: how far it moves the reference's logits

    def honest(self) -> Cause:
        """How well the reference does as it is."""
        if not fits(self._honest.tokens, self._theirs):
            return Cause((), math.inf, math.inf, ("logits",))
        error, ours = self._error(self._honest)
        budgets = self._budgets(self._honest, ours)
        self._budget = float(budgets.max())
        over: Array = np.asarray(np.any(error > budgets, axis=-1))
        self._wrong = over if over.any() else None
        self._plain = self._imitated(self._honest).misfit
        return self._cause((), self._plain, self._over(error, budgets))

    def causes(self, explanations: list[tuple[Bug, ...]], progress: Progress | None = None) -> list[Cause]:
        """How well explanations do."""
        imitated: list[tuple[_Imitated, tuple[Bug, ...]]] = []
        for done, explanation in enumerate(explanations):
            tried = [self._imitated(setup) for setup in with_bugs(self._honest, explanation)]
            imitated.append((min(tried, key=lambda one: one.misfit), explanation))
            if len(explanation) == 1:
                self._alone[explanation[0].key] = imitated[-1][0].misfit
                self._moves[explanation[0].key] = max(one.moved for one in tried)
            if progress is not None:
                progress(done + 1, len(explanations))
        found: list[Cause] = []
        measured = 0
        for one, explanation in sorted(imitated, key=lambda pair: pair[0].misfit):
            first = next((cause.misfit for cause in found if cause.explains), None)
            near = measured < _MEASURED if first is None else one.misfit <= TIE * first
            if near and one.misfit * CLOSER <= self._without(explanation):
                measured += 1
                found.append(self._cause(explanation, one.misfit, self.effect(one.setup)))
            else:
                found.append(Cause(explanation, one.rough, one.misfit, ("logits",)))
        return found

    def _without(self, explanation: tuple[Bug, ...]) -> float:
        """Least misfit of the reference, and of each of two bugs alone."""
        members = explanation if len(explanation) > 1 else ()
        return min([self._plain, *(self._alone.get(bug.key, math.inf) for bug in members)])

    def may_show(self, bug: Bug) -> bool:
        """Whether a bug could explain the logits."""
        return any(fits(setup.tokens, self._theirs) for setup in bug.setups(self._honest))

    def worth_trying(self, pairs: list[tuple[Bug, ...]]) -> list[tuple[Bug, ...]]:
        """Pairs that could explain the logits, by what each of the two does alone."""
        kept: list[tuple[Bug, ...]] = []
        for one, other in pairs:
            best = [self._alone[a.key] - _REACH * self._moves[b.key] for a, b in ((one, other), (other, one))]
            undone = min(self._moves[one.key], self._moves[other.key]) > _REACH * self._plain
            if not undone and not any(misfit * CLOSER > self._plain for misfit in best):
                setups = with_bugs(self._honest, (one, other))
                kept += [(one, other)] * any(fits(setup.tokens, self._theirs) for setup in setups)
        return kept

    def effect(self, setup: Setup) -> float:
        """Largest difference from their logits over its budget."""
        if not fits(setup.tokens, self._theirs):
            return math.inf
        error, ours = self._error(setup)
        return self._over(error, self._budgets(setup, ours))

    def budgets(self, setup: Setup) -> Array:
        """How far rounding may move an explanation's logits."""
        limit: Array = self._budgets(setup, self._run(setup))[..., 0]
        return limit

    def _cause(self, explanation: tuple[Bug, ...], misfit: float, ratio: float) -> Cause:
        return Cause(explanation, ratio, misfit, () if ratio <= 1 else ("logits",))

    @staticmethod
    def _over(error: Array, budgets: Array) -> float:
        """Largest error over its budget; padding has neither."""
        return float(np.max(error / np.maximum(budgets, 1e-300)))

    def _imitated(self, setup: Setup) -> _Imitated:
        """How an explanation does with every rounding imitated."""
        nothing = _Imitated(math.inf, math.inf, math.inf, setup)
        if not fits(setup.tokens, self._theirs):
            return nothing
        error, ours = self._error(setup, imitated=True)
        size = np.abs(ours).mean()
        if setup is self._honest:
            self._reference = ours
        moved = math.inf
        if self._reference is not None and self._reference.shape == ours.shape:
            moved = float(np.abs(ours - self._reference).mean() / np.abs(self._reference).mean())
        if not size or not np.isfinite(size):
            return nothing
        each = error.mean(axis=-1) / size
        judged = compared(setup, self._theirs)
        if self._wrong is not None and self._wrong.shape == judged.shape:
            judged = self._wrong
        misfit = float(np.exp(np.log(np.maximum(each[judged], self._unit)).mean()))
        return _Imitated(misfit, moved, float(error.max() / self._budget) if self._budget else math.inf, setup)

    def _error(self, setup: Setup, *, imitated: bool = False) -> tuple[Array, Array]:
        """Their difference from an explanation, zero where none is compared, and that one's logits, both (B, n, V)."""
        ours = self._run(setup, imitated=imitated)
        return difference(self._theirs, setup, ours, arithmetic_of(self._name).storage), ours

    def _budgets(self, setup: Setup, ours: Array) -> Array:
        """Limit of what rounding does to an explanation's logits, (B, n, 1)."""
        spread = np.zeros(ours.shape[:2])
        for seed in SEEDS:
            spread += np.square(self._run(setup, seed) - ours).mean(axis=-1) / len(SEEDS)
        limit: Array = DRIFTED * confidence(ours.size) * np.sqrt(spread)[..., None]
        return limit

    def _run(self, setup: Setup, seed: int | None = None, *, imitated: bool = False) -> Array:
        """Logits of an explanation, (B, n, V): exact, with noise of rounding size, or with every rounding imitated."""
        a = with_roundings(arithmetic_of(self._name), self._honest.numerics, setup.numerics)
        return logits_of(setup, a, columns_of(setup, self._theirs), seed=seed, imitated=imitated)
