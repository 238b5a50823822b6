"""A tensor together with how far the engine's own may lie from it, and the bound of an operation's result.

Two sizes of error are kept side by side. The worst case: every rounding as large as it can be, none cancelling another.
And the variance: roundings taken as independent, of mean zero and no larger than that, for which Hoeffding's inequality
says how far their sum strays by chance. A tensor that was given exactly has neither; the reference's tensor in place of
one that was not given has both, and they pass through every operation up to the next tensor that was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from refgemma.numerics import Array
from refgemma.oracle.bounds.arithmetic import Arithmetic, confidence
from refgemma.oracle.thresholds import BRIDGED

Size: TypeAlias = Array | float


@dataclass(frozen=True, eq=False)
class Known:
    """A tensor and the slack with which it is known."""

    value: Array  # the engine's tensor, or the reference's where that was not given
    worst: Size = 0.0  # how far the engine's own may be off, at most
    variance: Size = 0.0  # of how far it is off

    @property
    def exact(self) -> bool:
        """Whether there is no slack at all."""
        return isinstance(self.worst, float) and self.worst == 0.0

    def map(self, change: Callable[[Array], Array]) -> Known:
        """Same numbers in another layout."""
        if self.exact:
            return Known(change(self.value))
        full = (np.broadcast_to(size, self.value.shape) for size in (self.worst, self.variance))
        return Known(change(self.value), *map(change, full))


def joined(parts: list[Known], axis: int) -> Known:
    """Several pieces of one tensor, end to end."""
    value = np.concatenate([part.value for part in parts], axis)
    if all(part.exact for part in parts):
        return Known(value)
    worst, variance = (
        np.concatenate([np.broadcast_to(getattr(part, size), part.value.shape) for part in parts], axis)
        for size in ("worst", "variance")
    )
    return Known(value, worst, variance)


@dataclass(frozen=True, eq=False)
class Bound:
    """How far an engine's result of one operation may lie from the exact one."""

    worst: Array  # beyond it no order of the roundings explains the error
    likely: Array  # beyond it chance does not
    variance: Array  # for operations that read this result where the engine's was not given
    reason: str  # the roundings, in words

    def reshape(self, shape: tuple[int, ...]) -> Bound:
        """Same bound with its axes split or joined."""
        return Bound(self.worst.reshape(shape), self.likely.reshape(shape), self.variance.reshape(shape), self.reason)


def bound(
    arithmetic: Arithmetic,
    reason: str,
    shape: tuple[int, ...],
    *,
    firm: Size,
    loose: Size = 0.0,
    chance: Size = 0.0,
    agreeing: Size = 0.0,
    carried: tuple[Size, Size] = (0.0, 0.0),
) -> Bound:
    """Bound from its parts.

    firm: few roundings, which may all be at their largest. loose: worst case of many, whose variance is `chance`, and
    of which `agreeing` may go the same way. carried: worst case and variance that come with the inputs.
    """
    carried_worst, carried_variance = carried
    worst = firm + loose + carried_worst + arithmetic.tiny
    variance = chance + carried_variance
    strays = confidence(int(np.prod(shape))) * np.sqrt(variance)
    likely = np.minimum(worst, firm + agreeing + strays + arithmetic.tiny)
    if not (isinstance(carried_worst, float) and carried_worst == 0.0):
        worst = np.minimum(worst, BRIDGED * likely)
    total = variance + np.square(firm + agreeing)
    worst, likely, total = (np.broadcast_to(size, shape) for size in (worst, likely, total))
    return Bound(worst, likely, total, reason)
