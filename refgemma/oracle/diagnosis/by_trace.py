"""Explanations judged by a trace, each operation on the candidate's own inputs: everywhere, or in some layers only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from refgemma.checkpoint.load import Progress
from refgemma.config import Config
from refgemma.oracle.bounds.arithmetic import arithmetic_of, storage_unit
from refgemma.oracle.bugs.catalogue import Bug, with_bugs
from refgemma.oracle.bugs.locations import Location, locations_of
from refgemma.oracle.bugs.port import Setup
from refgemma.oracle.diagnosis.explanation import Misfit, fits, judge, loosens, misfits
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


@dataclass(frozen=True)
class Tried:
    """What one explanation, everywhere in the model, leaves of a candidate's trace."""

    bugs: tuple[Bug, ...]  # the explanation; none for the honest reference
    findings: dict[str, Finding]  # for every tensor
    off: dict[str, Misfit]  # how far its numbers are from the candidate's
    wrong: frozenset[str]  # tensors that are wrong, and not forgiven
    forgiven: frozenset[str]  # tensors outside their bounds that match the candidate nevertheless


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


# ---- bugs in some places only
#
# Nothing is run again: in a trace each operation is judged on its own inputs, so what a trial found at a location holds
# whatever the other locations do (`refgemma.oracle.bugs.locations`). A bug is placed at a location if something there
# is wrong without it, nothing is with it, and its numbers are much closer to the candidate's, which neither chance nor
# a looser bound gives.


@dataclass(frozen=True)
class Placed:
    """One bug, and where it is."""

    tried: Tried  # what it does everywhere
    here: tuple[Location, ...]  # where it is
    undecided: tuple[Location, ...]  # where these numbers cannot tell
    everywhere: bool  # whether no location contradicts that

    @property
    def seen(self) -> frozenset[str]:
        """Tensors in which it is seen."""
        return frozenset[str]().union(*(location.seen for location in self.here))

    def without(self, taken: frozenset[str]) -> Placed:
        """The same bug, less the locations that are seen in some tensors."""
        here = tuple(location for location in self.here if not location.seen & taken)
        return Placed(self.tried, here, self.undecided, self.everywhere and len(here) == len(self.here))


def place(honest: Tried, tried: Tried, config: Config, given: set[str], floor: Mapping[str, float]) -> Placed:
    """Find the locations at which a bug is."""
    here, undecided, everywhere = [], [], True
    for location in locations_of(tried.bugs[0], config, given):
        wrong = location.seen & honest.wrong
        nearer = {name for name in location.seen if is_closer(tried.off[name], honest.off[name], floor[name])}
        farther = any(is_closer(honest.off[name], tried.off[name], floor[name]) for name in location.seen)
        if location.seen & tried.wrong or farther or not wrong <= nearer:
            everywhere = False
        elif nearer:
            here.append(location)
        else:
            undecided.append(location)
    return Placed(tried, tuple(here), tuple(undecided), everywhere)


def is_closer(one: Misfit, other: Misfit, floor: float, times: float = CLOSER) -> bool:
    """Whether one explanation is so much closer to a tensor that chance cannot explain it."""
    mean = one.mean * times <= other.mean and other.mean > floor
    return mean or (one.peak * times <= other.peak and other.peak > floor and one.mean <= other.mean)


def placed_alone(honest: Tried, places: Sequence[Placed]) -> list[Cause]:
    """Causes of one bug that is at some of its locations only."""
    best: dict[tuple[str, ...], Cause] = {}
    for cause in (_cause(honest, (one,)) for one in places if one.here and not one.everywhere):
        found = best.setdefault(cause.keys, cause)
        best[cause.keys] = min(found, cause, key=lambda one: (len(one.left), one.misfit))
    return list(best.values())


def placed_pairs(honest: Tried, places: Sequence[Placed]) -> list[Cause]:
    """Causes of two bugs at different locations, at least one of them not everywhere, that explain everything."""
    causes: dict[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]], Cause] = {}
    for pair in combinations([one for one in places if one.here], 2):
        if not honest.wrong <= pair[0].seen | pair[1].seen or pair[0].tried.bugs == pair[1].tried.bugs:
            continue
        for both in ((pair[0], pair[1].without(pair[0].seen)), (pair[0].without(pair[1].seen), pair[1])):
            cause = _cause(honest, both)
            if all(one.here for one in both) and any(cause.only):
                found = causes.setdefault((cause.keys, cause.only), cause)
                causes[cause.keys, cause.only] = min(found, cause, key=lambda one: one.misfit)
    return [cause for cause in causes.values() if cause.explains]


def _cause(honest: Tried, places: tuple[Placed, ...]) -> Cause:
    """Cause of bugs, each at its locations, and the honest reference everywhere else."""
    by = {name: one.tried for one in places for name in one.seen}
    judged = {name: by.get(name, honest) for name in honest.findings}
    ratios = [tried.findings[name].ratio for name, tried in judged.items() if name not in tried.forgiven]
    return Cause(
        bugs=tuple(one.tried.bugs[0] for one in places),
        ratio=max((ratio for ratio in ratios if not math.isnan(ratio)), default=0.0),
        misfit=max((by.get(name, honest).off[name].mean for name in honest.wrong), default=math.inf),
        left=tuple(name for name, tried in judged.items() if name in tried.wrong),
        only=tuple(() if one.everywhere else _names(one.here) for one in places),
        undecided=tuple(() if one.everywhere else _names(one.undecided) for one in places),
    )


def _names(locations: tuple[Location, ...]) -> tuple[str, ...]:
    return tuple(name for location in locations for name in location.names)
