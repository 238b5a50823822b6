"""Explanations by known bugs that are in some layers only, put together from trials of each bug everywhere.

Nothing is run again: in a trace each operation is judged on its own inputs, so what a trial found at a location holds
whatever the other locations do (`refgemma.oracle.bugs.locations`). A bug is placed at a location if something there is
wrong without it, nothing is with it, and its numbers are much closer to the candidate's, which neither chance nor a
looser bound gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from refgemma.config import Config
from refgemma.oracle.bugs.catalogue import Bug
from refgemma.oracle.bugs.locations import Location, locations_of
from refgemma.oracle.diagnosis.explanation import Misfit
from refgemma.oracle.diagnosis.result import Cause
from refgemma.oracle.judging.grades import Finding
from refgemma.oracle.thresholds import CLOSER


@dataclass(frozen=True)
class Tried:
    """What one explanation, everywhere in the model, leaves of a candidate's trace."""

    bugs: tuple[Bug, ...]  # the explanation; none for the honest reference
    findings: dict[str, Finding]  # for every tensor
    off: dict[str, Misfit]  # how far its numbers are from the candidate's
    wrong: frozenset[str]  # tensors that are wrong, and not forgiven
    forgiven: frozenset[str]  # tensors outside their bounds that match the candidate nevertheless


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
