"""What the errors of one tensor have in common, in a few words that point at the mistake.

First where they are: only odd lanes, one head, from some position on. Then, there, what would make ours theirs: one
factor, one factor for each channel, another tensor, the same numbers in another order, a narrower format. Plain noise
gets no words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from refgemma.numerics import Array, from_bfloat16, to_bfloat16
from refgemma.oracle.judging.places import growth, places, regions

# An explanation must leave a twentieth of the error, or stay within rounding while it removes more than chance could:
# eight times the error's own variance for each number that was fitted.
_LEFT = 0.05
_F = 8.0


@dataclass(frozen=True, eq=False)
class _Errors:
    """Their and our numbers where they are compared, and what rounding may do to each."""

    theirs: Array
    ours: Array
    where: Array
    slack: Array | None

    def explained(self, guess: Array, fitted: int = 1, scale: float = 1.0) -> bool:
        """Whether `guess` is theirs up to rounding; `fitted` numbers of it were taken from theirs."""
        error = (self.theirs - self.ours)[self.where]
        left = np.abs(self.theirs - guess)[self.where]
        if not np.isfinite(left).all() or left.size <= 2 * fitted:
            return False
        before, after = float(np.sum(np.square(error))), float(np.sum(np.square(left)))
        if after <= _LEFT**2 * before:
            return True
        if self.slack is None or np.any(left > self.slack[self.where] * max(1.0, abs(scale)) * 1.05):
            return False
        return bool((before - after) / fitted > _F * after / (left.size - fitted))


def pattern(
    theirs: Array,
    ours: Array,
    *,
    axes: str = "",
    positions: Array | None = None,
    where: Array | None = None,
    slack: Array | None = None,
    others: Mapping[str, Array] | None = None,
) -> str:
    """Describe how their numbers differ from ours. positions (B, T)."""
    theirs, ours = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
    counted = np.ones(ours.shape, bool) if where is None else np.broadcast_to(where, ours.shape)
    broken = counted & ~np.isfinite(theirs)
    if broken.any():
        spot = places(broken, counted, axes, positions)
        return ", ".join([f"{broken.sum()} of {counted.sum()} numbers are not finite", *spot])
    error = np.where(counted, np.abs(theirs - ours), 0)
    if not error.any():
        return ""
    full = None if slack is None else np.broadcast_to(np.asarray(slack, np.float64), ours.shape)
    wrong = counted & (error > (error.max() / 30 if full is None else full))
    if not wrong.any():
        return ""
    if wrong.sum() == 1 < counted.sum():
        return "a single number"
    moved = next(_orders(_Errors(theirs, ours, counted, full), axes), None)
    if moved:
        return moved
    words = places(wrong, counted, axes, positions)
    within = counted & regions(wrong) if words else counted
    found = next(_explanations(_Errors(theirs, ours, within, full), axes, others or {}), None)
    if found:
        return ", ".join([*words, found])
    grows = growth(np.where(counted, theirs - ours, 0), np.where(counted, ours, 0), counted, axes, positions)
    return ", ".join([*words, *grows])


def _explanations(e: _Errors, axes: str, others: Mapping[str, Array]) -> Iterator[str]:
    """What would make ours theirs, simplest first."""
    theirs, ours, where = e.theirs, e.ours, e.where
    if not theirs[where].any():
        yield "all zero"
    t, o = theirs[where], ours[where]
    factor = float(t @ o) / max(float(o @ o), 1e-300)
    offset = float(np.mean(t - o))
    guesses = [
        (ours * factor, factor, f"constant factor {factor:.6g}"),
        (ours + offset, 1.0, f"constant offset {offset:.6g}"),
    ]
    for guess, scale, words in sorted(guesses, key=lambda guess: float(np.sum(np.square(t - guess[0][where])))):
        if e.explained(guess, scale=scale):
            yield "sign flipped" if scale == factor and abs(factor + 1) < 1e-3 else words
    for name, other in others.items():
        if other.shape == theirs.shape and e.explained(other.astype(np.float64), fitted=1):
            yield f"equal to {name}"
    yield from _formats(e)
    yield from _factors(e, axes)


def _orders(e: _Errors, axes: str) -> Iterator[str]:
    """Same numbers elsewhere: heads or lanes in another order."""
    words = {"N": "heads", "K": "heads", "H": "lanes", "D": "channels", "F": "channels"}
    for axis, letter in enumerate(axes):
        n = e.ours.shape[axis]
        if letter not in words or not 2 <= n <= 512 or np.any(e.where.any(axis) != e.where.all(axis)):
            continue
        theirs, ours = (np.moveaxis(np.where(e.where, x, 0), axis, 0).reshape(n, -1) for x in (e.theirs, e.ours))
        distance = np.square(theirs).sum(1)[:, None] + np.square(ours).sum(1) - 2 * theirs @ ours.T
        source = distance.argmin(axis=1)
        if np.array_equal(source, np.arange(n)):
            continue
        if e.explained(np.take(e.ours, source, axis)):
            order = " ".join(map(str, source[:8])) + (" ..." if n > 8 else "")
            same = "in another order" if len(set(source)) == n else "taken from others"
            yield f"{words[letter]} {same}: theirs are our {order}"


def _formats(e: _Errors) -> Iterator[str]:
    """Numbers of a narrower format than rounding allows."""
    t, o = e.theirs[e.where], e.ours[e.where]
    single = t.astype(np.float32)
    with np.errstate(over="ignore"):
        narrower = {
            "bfloat16": (from_bfloat16(to_bfloat16(single)), 2.0**-8),
            "float16": (t.astype(np.float16), 2.0**-11),
        }
    for name, (rounded, unit) in narrower.items():
        if np.array_equal(rounded, t) and np.all(np.abs(t - o) <= 1.01 * unit * np.abs(o) + 2.0**-24):
            allowed = np.abs(t - o) if e.slack is None else e.slack[e.where]
            if np.median(allowed) < 0.25 * unit * np.median(np.abs(o)):
                yield f"rounded to {name}"


def _factors(e: _Errors, axes: str) -> Iterator[str]:
    """One factor for each channel, or for each vector."""
    if e.ours.ndim < 2:
        return
    theirs, ours = (np.where(e.where, x, 0) for x in (e.theirs, e.ours))
    last = {"S": "key", "V": "vocabulary entry", "H": "lane"}.get(axes[-1:], "channel")
    vector = "head of each token" if axes[-1:] == "H" else "row" if axes[-1:] == "S" else "token"
    before = tuple(range(ours.ndim - 1))
    for along, word in ((before, last), ((-1,), vector)):
        size = np.sum(np.square(ours), axis=along, keepdims=True)
        factor = np.sum(theirs * ours, axis=along, keepdims=True) / np.where(size > 0, size, 1)
        many = int(np.sum(size > 0))
        if many > 1 and e.where.sum() >= 4 * many:
            seen = factor[size > 0]
            if e.explained(ours * factor, fitted=many, scale=float(np.abs(seen).max())):
                yield f"one factor for each {word}, {seen.min():.4g} to {seen.max():.4g}"
