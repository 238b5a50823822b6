"""Where in a tensor the wrong numbers are, axis by axis, in words; and whether errors grow with position."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from refgemma.numerics import Array

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
_FEW = 10  # wrong numbers from which on it is no coincidence that all of them are in one half of an axis


def regions(wrong: Array) -> Array:
    """Smallest block of index sets that holds all wrong numbers."""
    block = np.ones(wrong.shape, bool)
    for axis in range(wrong.ndim):
        hit = wrong.any(axis=tuple(i for i in range(wrong.ndim) if i != axis), keepdims=True)
        block = block & hit
    return block


def places(wrong: Array, counted: Array, axes: str, positions: Array | None = None) -> list[str]:
    """Say which part of each axis the wrong numbers keep to. positions (B, T)."""
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
    return int((counted & ~inside).sum()) * -math.log1p(-share) > 20


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
    if count < _FEW:
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
    if len(index) <= min(4, len(all_of) // 2) and count >= _FEW * len(index):
        return [f"only {plural} {', '.join(map(str, index))}"]
    return []


def growth(error: Array, ours: Array, counted: Array, axes: str, positions: Array | None) -> list[str]:
    """Say if errors, relative to what they are errors of, grow or shrink with position.

    At least six positions; their order and that of the errors agree (rank correlation above 0.9), and the last third is
    at least three times as wrong as the first.

    positions (B, T).
    """
    if "T" not in axes or "B" not in axes:
        return []
    rest = tuple(i for i, letter in enumerate(axes) if letter not in "BT")
    T = error.shape[axes.index("T")]
    at = np.broadcast_to(np.arange(T) if positions is None else positions, (error.shape[axes.index("B")], T))
    squares, sizes = (np.square(x).sum(axis=rest) for x in (error, ours))  # BT
    used = counted.any(axis=rest) & (at >= 0)
    here = np.unique(at[used])
    if len(here) < 6:
        return []
    sums = [(squares[used & (at == p)].sum(), sizes[used & (at == p)].sum()) for p in here]
    relative = np.array([e / s if s > 0 else 0 for e, s in sums]) ** 0.5
    ranks = relative.argsort().argsort()
    third = len(here) // 3
    early, late = relative[:third].mean(), relative[-third:].mean()
    agreement = np.corrcoef(ranks, np.arange(len(here)))[0, 1]
    if agreement > 0.9 and late > 3 * early:
        return ["grows with position"]
    if agreement < -0.9 and early > 3 * late:
        return ["shrinks with position"]
    return []
