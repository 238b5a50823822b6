"""Explanations judged by a trace: each operation on the candidate's own inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable

from refgemma.checkpoint.load import Progress
from refgemma.oracle.bounds.arithmetic import arithmetic_of, storage_unit
from refgemma.oracle.bugs.catalogue import Bug, with_bugs
from refgemma.oracle.bugs.port import Setup
from refgemma.oracle.diagnosis.explanation import Misfit, fits, judge, loosens, misfits
from refgemma.oracle.diagnosis.placement import Tried, is_closer, place, placed_alone, placed_pairs
from refgemma.oracle.diagnosis.result import Cause
from refgemma.oracle.judging.grades import Finding
from refgemma.oracle.operations import names_of, split_name
from refgemma.oracle.thresholds import CLOSER
from refgemma.oracle.traces.trace import Trace

Explanation = tuple[Bug, ...]
Findings = dict[str, Finding]

# The bounds are those of Gemma's operations. A bug may round more often, or make numbers of another size: this many
# roundings of a token's largest number are allowed, and for angles as many of the farthest position.
_ROUNDINGS = {"float32": 64, "float64": 64, "bfloat16": 3, "float16": 3}


class TraceTrial:
    """A candidate's trace, and what each explanation leaves wrong in it."""

    def __init__(self, candidate: Trace, honest: Setup, arithmetic: str) -> None:
        self._candidate, self._honest, self._arithmetic = candidate, honest, arithmetic
        a = arithmetic_of(arithmetic)
        self._allowed = _ROUNDINGS[a.storage] * a.narrow
        self._stored = {name: storage_unit(candidate.dtypes.get(name, ""), a.storage) for name in candidate.tensors}
        self._floor = {name: 4 * max(a.unit, unit) for name, unit in self._stored.items()}  # a few roundings
        self._allowed_angle = _ROUNDINGS["float32"] * a.unit * max(0, int(candidate.positions.max()))
        self._given = [name for name in names_of(honest.config) if name in candidate.tensors]
        base = self._judged(honest)
        self._base: Findings = base or {}
        self._wrong = set(self._given) if base is None else _wrong(base)
        self._plain = misfits(honest, candidate)
        self._left: dict[str, set[str]] = {}  # by key: what a bug leaves wrong
        self._tried: list[Tried] = []  # single bugs, once for each edit

    def honest(self) -> Cause:
        """How well the reference does as it is."""
        return self._cause((), self._honest)

    def causes(self, explanations: list[Explanation], progress: Progress | None = None) -> list[Cause]:
        """How well explanations do."""
        found = []
        for done, explanation in enumerate(explanations):
            tried = [self._cause(explanation, setup) for setup in with_bugs(self._honest, explanation)]
            found.append(min(tried, key=lambda cause: (len(cause.left), cause.misfit)))
            if progress is not None:
                progress(done + 1, len(explanations))
        return found

    def may_show(self, bug: Bug) -> bool:
        """Whether a bug could explain any of the wrong tensors."""
        if bug.kind == "tokens":
            return self._candidate.last or not self._base
        return bool(self._touched(bug) & self._wrong)

    def worth_trying(self, pairs: list[Explanation]) -> list[Explanation]:
        """Pairs that could explain everything, by what each of the two does alone."""
        if not self._base:  # other tokens were fed, so one of the two must be that
            return [pair for pair in pairs if any(bug.kind == "tokens" for bug in pair)]
        kept: list[Explanation] = []
        for one, other in pairs:
            touched = [self._touched(one), self._touched(other)]
            if touched[0] & touched[1]:  # one may move what the other touches, such as a norm to another place
                touched = [touched[0] | touched[1]] * 2
            left = [self._left.get(bug.key, self._wrong) for bug in (one, other)]
            helps = all(names & self._wrong for names in touched)
            together = (left[0] & left[1]) | (left[0] - self._wrong) | (left[1] - self._wrong)
            if helps and self._wrong <= touched[0] | touched[1] and together <= touched[0] & touched[1]:
                kept.append((one, other))
        return kept

    def in_some_places(self, *, pairs: bool = False) -> list[Cause]:
        """How well bugs do that are in some places only, of those that were tried everywhere."""
        if not self._base or self._candidate.last:  # of earlier positions the candidate gave nothing
            return []
        honest = Tried((), self._base, self._plain, frozenset(self._wrong), frozenset())
        config, given = self._honest.config, set(self._given)
        places = [place(honest, tried, config, given, self._floor) for tried in self._tried if tried.bugs[0].where]
        return placed_pairs(honest, places) if pairs else placed_alone(honest, places)

    def closer(self, bug: Bug) -> Cause | None:
        """Where nothing is wrong: the cause of a bug that still comes much closer to the candidate."""
        names = [name for name in self._given if split_name(name)[1] in bug.where]
        plain = _mean(self._plain, names)
        best = min((_mean(misfits(s, self._candidate), names) for s in bug.setups(self._honest)), default=math.inf)
        return Cause((bug,), 0.0, best, ()) if names and best * CLOSER < plain else None

    def _judged(self, setup: Setup) -> Findings | None:
        """Findings by name; None if the setup feeds another number of tokens."""
        if not fits(setup.tokens, self._candidate):
            return None
        return {one.name: one for one in judge(setup, self._honest, self._candidate, self._arithmetic)}

    def _cause(self, explanation: Explanation, setup: Setup) -> Cause:
        tried = self._try(explanation, setup)
        if tried is None:
            return Cause(explanation, math.inf, math.inf, tuple(self._given))
        if len(explanation) == 1:
            key = explanation[0].key
            self._left[key] = self._left.get(key, set(tried.wrong)) & tried.wrong
            self._tried.append(tried)
        ratios = [
            f.ratio for name, f in tried.findings.items() if name not in tried.forgiven and not math.isnan(f.ratio)
        ]
        left = tuple(name for name in tried.findings if name in tried.wrong)
        return Cause(explanation, max(ratios, default=0.0), _mean(tried.off, self._wrong or self._given), left)

    def _try(self, explanation: Explanation, setup: Setup) -> Tried | None:
        findings = self._base if not explanation and self._base else self._judged(setup)
        if findings is None:
            return None
        off = misfits(setup, self._candidate)
        moved = {kind for bug in explanation for kind in bug.where}
        outside = _wrong(findings)
        forgiven = {name for name in outside if split_name(name)[1] in moved and self._matches(name, off)}
        wrong = outside - forgiven
        if explanation and self._base:
            wrong |= {name for name in self._wrong if not self._comes_closer(name, off)}
        if self._base and loosens(self._arithmetic, self._honest, setup):
            # Inside looser bounds, but no closer than without the bug: not explained by it.
            wrong |= {name for name in self._wrong if not is_closer(off[name], self._plain[name], self._floor[name])}
            for bug in explanation if len(explanation) > 1 else ():  # nor closer than with one of the two alone
                alone = [tried.off for tried in self._tried if tried.bugs == (bug,)]
                wrong |= {
                    name
                    for name in self._left.get(bug.key, ())
                    if not all(is_closer(off[name], other[name], self._floor[name]) for other in alone)
                }
        return Tried(explanation, findings, off, frozenset(wrong), frozenset(forgiven - wrong))

    def _comes_closer(self, name: str, off: dict[str, Misfit]) -> bool:
        """Whether a tensor is closer to the candidate's than without the explanation.

        With slack for many tensors that were not given, being inside the bound may say nothing.
        """
        return off[name].mean <= self._floor[name] or is_closer(off[name], self._plain[name], 0.0, times=2.0)

    def _matches(self, name: str, off: dict[str, Misfit]) -> bool:
        """Whether a tensor outside its bound matches the candidate's nevertheless, see `_ROUNDINGS`."""
        if name not in off:
            return False
        allowed = max(self._allowed, _ROUNDINGS["bfloat16"] * self._stored[name])
        allowed += self._allowed_angle if name.endswith("_rope") else 0
        plain = self._plain[name].mean if name in self._plain else math.inf
        return off[name].peak <= allowed and off[name].mean * CLOSER <= plain

    def _touched(self, bug: Bug) -> set[str]:
        """Tensors that a bug moves, given the right inputs; all of them where one of these was not given."""
        moved = {name for name in names_of(self._honest.config) if split_name(name)[1] in bug.where}
        return moved if moved and moved <= set(self._given) else set(self._given)


def _mean(off: dict[str, Misfit], names: Iterable[str]) -> float:
    """Mean misfit of the tensor where that is largest; infinite if there is none."""
    return max((off[name].mean for name in names if name in off), default=math.inf)


def _wrong(findings: Findings) -> set[str]:
    return {name for name, finding in findings.items() if finding.grade == "wrong"}
