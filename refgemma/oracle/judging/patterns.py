"""What the errors of one tensor have in common, in a few words that point at the mistake.

First where they are: only odd lanes, one head, from some position on. Then what would turn the reference's numbers
there into the candidate's: one factor, one factor for each channel, another tensor, the same numbers in another order,
a narrower format. Plain noise gets no words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from refgemma.numerics import Array, from_bfloat16, to_bfloat16
from refgemma.oracle.thresholds import (
    F_RATIO,
    GROWTH_POSITIONS,
    GROWTH_RANK,
    GROWTH_TIMES,
    LEFT,
    NO_CHANCE,
    PEAK,
    TELLING,
    WITHIN,
)

# Words for one index of each axis.
_ONE = {
    "B": "row",
    "T": "position",
    "S": "key",
    "N": "head",
    "K": "head",
    "H": "lane",
    "D": "channel",
    "F": "channel",
    "V": "vocabulary entry",
}


@dataclass(frozen=True, eq=False)
class _Errors:
    """The candidate's and the reference's numbers, where they are compared, and what rounding may do to each."""

    candidate: Array
    reference: Array
    where: Array
    slack: Array | None

    def explained(self, guess: Array, fitted: int = 1, scale: float = 1.0) -> bool:
        """Whether `guess` is the candidate up to rounding; `fitted` numbers in it were fitted to the candidate.

        It must leave little of the error, or stay within rounding and remove more than chance could.
        """
        error = (self.candidate - self.reference)[self.where]
        left = np.abs(self.candidate - guess)[self.where]
        if not np.isfinite(left).all() or left.size <= 2 * fitted:
            return False
        before, after = float(np.sum(np.square(error))), float(np.sum(np.square(left)))
        if after <= LEFT**2 * before:
            return True
        if self.slack is None or np.any(left > self.slack[self.where] * max(1.0, abs(scale)) * WITHIN):
            return False
        return bool((before - after) / fitted > F_RATIO * after / (left.size - fitted))


def pattern(
    candidate: Array,
    reference: Array,
    *,
    axes: str = "",
    positions: Array | None = None,
    where: Array | None = None,
    slack: Array | None = None,
    others: Mapping[str, Array] | None = None,
) -> str:
    """Describe how the candidate differs from the reference; empty for noise."""
    candidate, reference = np.asarray(candidate, np.float64), np.asarray(reference, np.float64)
    counted = np.ones(reference.shape, bool) if where is None else np.broadcast_to(where, reference.shape)
    broken = counted & ~np.isfinite(candidate)
    if broken.any():
        spot = _places(broken, counted, axes, positions)
        return ", ".join([f"{broken.sum()} of {counted.sum()} numbers are not finite", *spot])
    error = np.where(counted, np.abs(candidate - reference), 0)
    if not error.any():
        return ""
    full = None if slack is None else np.broadcast_to(np.asarray(slack, np.float64), reference.shape)
    wrong = counted & (error > (error.max() / PEAK if full is None else full))
    if not wrong.any():
        return ""
    if wrong.sum() == 1 < counted.sum():
        return "a single number"
    moved = next(_orders(_Errors(candidate, reference, counted, full), axes), None)
    if moved:
        return moved
    words = _places(wrong, counted, axes, positions)
    within = counted & _region(wrong) if words else counted
    found = next(_explanations(_Errors(candidate, reference, within, full), axes, others or {}), None)
    if found:
        return ", ".join([*words, found])
    grows = _growth(
        np.where(counted, candidate - reference, 0), np.where(counted, reference, 0), counted, axes, positions
    )
    return ", ".join([*words, *grows])


def _explanations(e: _Errors, axes: str, others: Mapping[str, Array]) -> Iterator[str]:
    """What would turn the reference into the candidate, simplest first."""
    candidate, reference, where = e.candidate, e.reference, e.where
    if not candidate[where].any():
        yield "all zero"
    t, o = candidate[where], reference[where]
    factor = float(t @ o) / max(float(o @ o), 1e-300)
    offset = float(np.mean(t - o))
    guesses = [
        (reference * factor, factor, f"constant factor {factor:.6g}"),
        (reference + offset, 1.0, f"constant offset {offset:.6g}"),
    ]
    for guess, scale, words in sorted(guesses, key=lambda guess: float(np.sum(np.square(t - guess[0][where])))):
        if e.explained(guess, scale=scale):
            yield "sign flipped" if scale == factor and abs(factor + 1) < 1e-3 else words
    for name, other in others.items():
        if other.shape == candidate.shape and e.explained(other.astype(np.float64), fitted=1):
            yield f"equal to {name}"
    yield from _formats(e)
    yield from _factors(e, axes)


def _orders(e: _Errors, axes: str) -> Iterator[str]:
    """Same numbers elsewhere: heads or lanes in another order."""
    words = {"N": "heads", "K": "heads", "H": "lanes", "D": "channels", "F": "channels"}
    for axis, letter in enumerate(axes):
        n = e.reference.shape[axis]
        if letter not in words or not 2 <= n <= 512 or np.any(e.where.any(axis) != e.where.all(axis)):
            continue
        candidate, reference = (
            np.moveaxis(np.where(e.where, x, 0), axis, 0).reshape(n, -1) for x in (e.candidate, e.reference)
        )
        distance = np.square(candidate).sum(1)[:, None] + np.square(reference).sum(1) - 2 * candidate @ reference.T
        source = distance.argmin(axis=1)
        if np.array_equal(source, np.arange(n)):
            continue
        if e.explained(np.take(e.reference, source, axis)):
            order = " ".join(map(str, source[:8])) + (" ..." if n > 8 else "")
            same = "in another order" if len(set(source)) == n else "taken from others"
            yield f"{words[letter]} {same}: the candidate has the reference's {order}"


def _formats(e: _Errors) -> Iterator[str]:
    """Numbers of a narrower format than rounding allows."""
    t, o = e.candidate[e.where], e.reference[e.where]
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
    if e.reference.ndim < 2:
        return
    candidate, reference = (np.where(e.where, x, 0) for x in (e.candidate, e.reference))
    last = {"S": "key", "V": "vocabulary entry", "H": "lane"}.get(axes[-1:], "channel")
    vector = "head of each token" if axes[-1:] == "H" else "row" if axes[-1:] == "S" else "token"
    before = tuple(range(reference.ndim - 1))
    for along, word in ((before, last), ((-1,), vector)):
        size = np.sum(np.square(reference), axis=along, keepdims=True)
        factor = np.sum(candidate * reference, axis=along, keepdims=True) / np.where(size > 0, size, 1)
        many = int(np.sum(size > 0))
        if many > 1 and e.where.sum() >= 4 * many:
            seen = factor[size > 0]
            if e.explained(reference * factor, fitted=many, scale=float(np.abs(seen).max())):
                yield f"one factor for each {word}, {seen.min():.4g} to {seen.max():.4g}"


def _region(wrong: Array) -> Array:
    """Smallest block of index sets that holds all wrong numbers."""
    block = np.ones(wrong.shape, bool)
    for axis in range(wrong.ndim):
        hit = wrong.any(axis=tuple(i for i in range(wrong.ndim) if i != axis), keepdims=True)
        block = block & hit
    return block


def _places(wrong: Array, counted: Array, axes: str, positions: Array | None = None) -> list[str]:
    """Say which part of each axis the wrong numbers keep to."""
    words = []
    for axis, letter in enumerate(axes):
        rest = tuple(i for i in range(wrong.ndim) if i != axis)
        possible: Array = np.asarray(counted.any(axis=rest))
        hit: Array = np.asarray(wrong.any(axis=rest))
        if possible.sum() < 2 or np.array_equal(hit, possible):
            continue
        if letter in "TB" and positions is not None:
            words += _tokens(wrong, counted, axes, positions, letter)
        elif _no_chance(wrong, counted, np.expand_dims(hit, rest)):
            words += _part(hit, possible, _ONE[letter], int(wrong.sum()))
    return list(dict.fromkeys(words))


def _no_chance(wrong: Array, counted: Array, inside: Array) -> bool:
    """Whether numbers outside are right by more than luck: as often wrong as those inside, they would not all be."""
    inside = np.broadcast_to(inside, wrong.shape)
    share = min(float(wrong.sum()) / max(int((counted & inside).sum()), 1), 0.9999)
    return int((counted & ~inside).sum()) * -math.log1p(-share) > NO_CHANCE


def _tokens(wrong: Array, counted: Array, axes: str, positions: Array, letter: str) -> list[str]:
    """Rows and positions, by what is padding."""
    order = (axes.index("B"), axes.index("T"))
    rest = tuple(i for i in range(wrong.ndim) if i not in order)
    token: Array = np.asarray(wrong.any(axis=rest))  # BT
    real = positions >= 0
    for words, some in _sets_of_tokens(token, real, positions, letter):
        if not np.any(token & ~some) and _no_chance(wrong, counted, np.expand_dims(some, rest)):
            return [words]
    return []


def _sets_of_tokens(token: Array, real: Array, positions: Array, letter: str) -> Iterator[tuple[str, Array]]:
    """Sets that the wrong tokens may lie in, the most telling first; (B, T)."""
    least, most = int(positions[token].min()), int(positions[token].max())
    if letter == "B":
        padded = np.broadcast_to((~real).any(axis=1, keepdims=True), real.shape)
        hit = np.broadcast_to(token.any(axis=1, keepdims=True), real.shape)
        if padded.any() and not padded.all() and np.array_equal(hit, padded):
            yield "only rows that hold padding", padded
        rows = np.flatnonzero(token.any(axis=1))
        if len(rows) == 1:
            yield f"only row {rows[0]}", hit
        return
    yield "only the first token", real & (np.cumsum(real, axis=1) == 1)
    yield "only the last token", real & (np.cumsum(real[:, ::-1], axis=1)[:, ::-1] == 1)
    beside = np.zeros_like(real)
    beside[:, 1:] |= ~real[:, :-1]
    beside[:, :-1] |= ~real[:, 1:]
    yield "only neighbours of padding", beside & real
    if least == most:
        yield f"only position {least}", positions == least
    later, earlier = real & (positions >= least), real & (positions <= most)
    if np.array_equal(token, later):
        yield f"from position {least} on", later
    if np.array_equal(token, earlier):
        yield f"only up to position {most}", earlier
    if least > positions[real].min() + 1:
        yield f"only beyond position {least - 1}", later


def _part(hit: Array, possible: Array, word: str, count: int) -> list[str]:
    """Words for the indices that are hit, out of those that could be."""
    index, all_of = np.flatnonzero(hit), np.flatnonzero(possible)
    n = len(hit)
    plural = "vocabulary entries" if word == "vocabulary entry" else word + "s"
    if len(index) == 1:
        return [f"only {word} {index[0]}"]
    if count < TELLING:
        return []
    halves = {
        f"only odd {plural}": np.arange(n) % 2 == 1,
        f"only even {plural}": np.arange(n) % 2 == 0,
        f"only the first half of the {plural}": np.arange(n) < n // 2,
        f"only the second half of the {plural}": np.arange(n) >= n // 2,
    }
    for words, half in halves.items():
        if n >= 4 and not np.any(hit & ~half) and len(index) >= max(2, np.sum(half & possible) // 2):
            return [words]
    missing = np.setdiff1d(all_of, index)
    if len(missing) == 1 and len(all_of) > 3:
        return [f"all {plural} but {missing[0]}"]
    if np.array_equal(index, all_of[all_of >= index[0]]):
        return [f"from {word} {index[0]} on"]
    if np.array_equal(index, all_of[all_of <= index[-1]]):
        return [f"only up to {word} {index[-1]}"]
    if len(index) <= min(4, len(all_of) // 2) and count >= TELLING * len(index):
        return [f"only {plural} {', '.join(map(str, index))}"]
    return []


def _growth(error: Array, reference: Array, counted: Array, axes: str, positions: Array | None) -> list[str]:
    """Say if errors, relative to the reference, grow or shrink with position."""
    if "T" not in axes or "B" not in axes:
        return []
    rest = tuple(i for i, letter in enumerate(axes) if letter not in "BT")
    T = error.shape[axes.index("T")]
    at = np.broadcast_to(np.arange(T) if positions is None else positions, (error.shape[axes.index("B")], T))
    squares, sizes = (np.square(x).sum(axis=rest) for x in (error, reference))  # BT
    used = counted.any(axis=rest) & (at >= 0)
    here = np.unique(at[used])
    if len(here) < GROWTH_POSITIONS:
        return []
    sums = [(squares[used & (at == p)].sum(), sizes[used & (at == p)].sum()) for p in here]
    relative = np.array([e / s if s > 0 else 0 for e, s in sums]) ** 0.5
    ranks = relative.argsort().argsort()
    third = len(here) // 3
    early, late = relative[:third].mean(), relative[-third:].mean()
    agreement = np.corrcoef(ranks, np.arange(len(here)))[0, 1]
    if agreement > GROWTH_RANK and late > GROWTH_TIMES * early:
        return ["grows with position"]
    if agreement < -GROWTH_RANK and early > GROWTH_TIMES * late:
        return ["shrinks with position"]
    return []
