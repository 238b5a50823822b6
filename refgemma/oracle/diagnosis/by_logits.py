"""Explanations judged by final logits alone: the reference, run by itself.

As in `refgemma.oracle.judging.free_run`, the budget is measured: runs in float64 with noise of rounding size at every
tensor. Here the noise passes through the bugs as well, which may pass it on otherwise than Gemma does.

Being inside its budget is not enough for an explanation, since some bugs have large ones. It must come clearly closer
to the candidate's logits than the reference does, and two bugs closer than either of them.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np

from refgemma.checkpoint.load import Progress
from refgemma.numerics import Array
from refgemma.oracle.bounds.arithmetic import arithmetic_of, confidence, params_in, storage_slack
from refgemma.oracle.bounds.flow import Flow
from refgemma.oracle.bounds.slack import Known
from refgemma.oracle.bugs.catalogue import Bug, with_bugs
from refgemma.oracle.bugs.port import Chunks, Setup, run
from refgemma.oracle.diagnosis.explanation import fits, with_roundings
from refgemma.oracle.diagnosis.result import Cause
from refgemma.oracle.thresholds import CLOSER_LOGITS, DRIFTED, MEASURED, REACH, SEEDS, TIE
from refgemma.oracle.traces.trace import Trace, of_chunk

_LOGITS = 2**24  # compared at most; of a longer text the last positions


@dataclass(frozen=True, eq=False)
class _Imitated:
    """How an explanation does, every rounding imitated.

    Differences are means over the mean magnitude. The misfit is of the positions to be explained, the mean of its
    logarithms: where roundings fall either way, some positions are far off even with the right explanation and some are
    exact; with a wrong one none is.
    """

    misfit: float  # from the candidate's logits
    moved: float  # from the reference's
    rough: float  # largest difference from the candidate's over the largest budget of the reference
    setup: Setup


class LogitsTrial:
    """A candidate's logits, and how close each explanation comes to them."""

    def __init__(self, candidate: Trace, honest: Setup, arithmetic: str) -> None:
        self._candidate, self._honest = candidate, honest
        self._arithmetic = arithmetic_of(arithmetic)
        self._budget: float | None = None  # of the honest run, the largest
        self._wrong: Array | None = None  # positions at which it is outside, (B, n)
        self._plain = math.inf  # its misfit
        self._reference: Array | None = None  # its logits, every rounding imitated
        self._alone: dict[str, float] = {}  # by key: misfit of one bug
        self._moves: dict[str, float] = {}  # by key: how far it moves the reference's logits

    def honest(self) -> Cause:
        """How well the reference does as it is."""
        if not fits(self._honest.tokens, self._candidate):
            return Cause((), math.inf, math.inf, ("logits",))
        error, computed = self._error(self._honest)
        budgets = self._budgets(self._honest, computed)
        self._budget = float(budgets.max())
        over: Array = np.asarray(np.any(error > budgets, axis=-1))
        self._wrong = over if over.any() else None
        self._plain = self._imitated(self._honest).misfit
        return _cause((), self._plain, _over(error, budgets))

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
            near = measured < MEASURED if first is None else one.misfit <= TIE * first
            if near and one.misfit * CLOSER_LOGITS <= self._without(explanation):
                measured += 1
                found.append(_cause(explanation, one.misfit, self.effect(one.setup)))
            else:
                found.append(Cause(explanation, one.rough, one.misfit, ("logits",)))
        return found

    def _without(self, explanation: tuple[Bug, ...]) -> float:
        """Least misfit of the reference, and of each of two bugs alone."""
        members = explanation if len(explanation) > 1 else ()
        return min([self._plain, *(self._alone.get(bug.key, math.inf) for bug in members)])

    def may_show(self, bug: Bug) -> bool:
        """Whether a bug could explain the logits."""
        return any(fits(setup.tokens, self._candidate) for setup in bug.setups(self._honest))

    def worth_trying(self, pairs: list[tuple[Bug, ...]]) -> list[tuple[Bug, ...]]:
        """Pairs that could explain the logits, by what each of the two does alone."""
        kept: list[tuple[Bug, ...]] = []
        for one, other in pairs:
            best = [self._alone[a.key] - REACH * self._moves[b.key] for a, b in ((one, other), (other, one))]
            undone = min(self._moves[one.key], self._moves[other.key]) > REACH * self._plain
            if not undone and not any(misfit * CLOSER_LOGITS > self._plain for misfit in best):
                setups = with_bugs(self._honest, (one, other))
                kept += [(one, other)] * any(fits(setup.tokens, self._candidate) for setup in setups)
        return kept

    def in_some_places(self, *, pairs: bool = False) -> list[Cause]:
        """Nothing: final logits do not show places."""
        return []

    def effect(self, setup: Setup) -> float:
        """Largest difference from the candidate's logits over its budget."""
        if not fits(setup.tokens, self._candidate):
            return math.inf
        error, computed = self._error(setup)
        return _over(error, self._budgets(setup, computed))

    def budgets(self, setup: Setup) -> Array:
        """How far rounding may move an explanation's logits; (B, n)."""
        limit: Array = self._budgets(setup, self._logits(setup))[..., 0]
        return limit

    def _imitated(self, setup: Setup) -> _Imitated:
        nothing = _Imitated(math.inf, math.inf, math.inf, setup)
        if not fits(setup.tokens, self._candidate):
            return nothing
        error, computed = self._error(setup, imitated=True)
        size = np.abs(computed).mean()
        if setup is self._honest:
            self._reference = computed
        moved = math.inf
        if self._reference is not None and self._reference.shape == computed.shape:
            moved = float(np.abs(computed - self._reference).mean() / np.abs(self._reference).mean())
        if not size or not np.isfinite(size):
            return nothing
        each = error.mean(axis=-1) / size
        judged = self._compared(setup)
        if self._wrong is not None and self._wrong.shape == judged.shape:
            judged = self._wrong
        misfit = float(np.exp(np.log(np.maximum(each[judged], self._arithmetic.unit)).mean()))
        return _Imitated(misfit, moved, float(error.max() / self._budget) if self._budget else math.inf, setup)

    def _budgets(self, setup: Setup, computed: Array) -> Array:
        """Limit of what rounding does to an explanation's logits; (B, n, 1)."""
        spread = np.zeros(computed.shape[:2])
        for seed in SEEDS:
            spread += np.square(self._logits(setup, seed) - computed).mean(axis=-1) / len(SEEDS)
        limit: Array = DRIFTED * confidence(computed.size) * np.sqrt(spread)[..., None]
        return limit

    def _error(self, setup: Setup, *, imitated: bool = False) -> tuple[Array, Array]:
        """The candidate's difference from an explanation, 0 where none is compared, and its logits; (B, n, V)."""
        computed = self._logits(setup, imitated=imitated)
        columns = self._columns(setup)
        trace = replace(self._candidate, tokens=setup.tokens, positions=setup.positions)
        value, _ = of_chunk(trace, "logits", slice(int(columns[0]), int(columns[-1]) + 1))
        value = value[:, columns - columns[0]]
        stored = storage_slack(value, trace.dtypes.get("logits", ""), self._arithmetic.storage)
        error = np.maximum(np.abs(value - computed) - stored, 0)
        error = np.where(self._compared(setup)[..., None], error, 0)
        return np.where(np.isfinite(error), error, np.inf), computed

    def _logits(self, setup: Setup, seed: int | None = None, *, imitated: bool = False) -> Array:
        """Logits of an explanation, (B, n, V): exact, with noise of rounding size, or with every rounding imitated."""
        a = with_roundings(self._arithmetic, self._honest.numerics, setup.numerics)
        columns = self._columns(setup)
        setup = setup.but(params=params_in(setup.params, a), numerics=setup.numerics if imitated else a.reference)
        chunks, flow = Chunks(), None if seed is None else Flow(setup.params, setup.config, a)

        def tap(name: str, value: Array) -> Array:
            chunk = chunks.at(name, value)
            if flow is not None:
                if name == "embed":
                    flow.next_chunk(setup.tokens[:, chunk], setup.positions[:, chunk])
                size = np.sqrt(flow.bound_of(name, value).variance)
                rng = np.random.default_rng([seed, chunk.start, zlib.crc32(name.encode())])
                value = value + rng.standard_normal(value.shape) * size
            if name == "final_norm":
                value = value[:, columns[(columns >= chunk.start) & (columns < chunk.stop)] - chunk.start]
            if flow is not None:
                flow.goes_on_with(name, Known(value))
            return value

        return run(setup, tap)

    # ---- which positions

    def _columns(self, setup: Setup) -> Array:
        """Columns that are compared in any row; (n,)."""
        B, T = setup.tokens.shape
        if self._candidate.last:
            return np.unique(np.maximum(self._kept(setup), 0))
        return np.arange(T)[-max(1, _LOGITS // (B * setup.config.vocab_size)) :]

    def _compared(self, setup: Setup) -> Array:
        """Where the candidate has logits; (B, n)."""
        columns = self._columns(setup)
        here: Array = setup.positions[:, columns] >= 0
        if self._candidate.last:
            here &= (columns[None, :, None] == self._kept(setup)[:, None]).any(axis=-1)
        return here

    def _kept(self, setup: Setup) -> Array:
        """Columns of the last positions of each row, as many as the candidate kept; (B, kept)."""
        ends = setup.tokens.shape[1] - 1 - (setup.positions[:, ::-1] >= 0).argmax(axis=1)
        kept: Array = ends[:, None] + np.arange(1 - self._candidate.tensors["logits"].shape[1], 1)
        return kept


def _cause(explanation: tuple[Bug, ...], misfit: float, ratio: float) -> Cause:
    return Cause(explanation, ratio, misfit, () if ratio <= 1 else ("logits",))


def _over(error: Array, budgets: Array) -> float:
    """Largest error over its budget; padding has neither."""
    return float(np.max(error / np.maximum(budgets, 1e-300)))
