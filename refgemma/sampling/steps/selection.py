"""Tokens that are left, what they weigh, and the most likely of them: what steps and records need of arrays."""

from __future__ import annotations

import functools

import numpy as np

from refgemma.numerics import Array

# The largest numbers are looked for among those above a floor, which the highest of so many groups give. It is worth
# the while from so many numbers a group on, and where no more than one of so many is above the floor.
_GROUPS, _ROWS = 4096, 8


@functools.lru_cache(maxsize=2)
def _all(V: int) -> Array:
    """Every id; made once, since to write them costs more than the steps that need them."""
    ids = np.arange(V)
    ids.flags.writeable = False
    return ids


def left(logits: Array) -> tuple[Array, Array]:
    """Tokens that have not been removed. logits (V,) -> ids (n,), values (n,)."""
    if logits.min() > -np.inf:
        return _all(len(logits)), logits
    ids = np.flatnonzero(logits > -np.inf)
    return ids, logits[ids]


def exp_below(logits: Array) -> Array:
    """Exponentials, scaled so that the largest is 1: probabilities but for their total. logits (n,)."""
    out: Array = logits - logits.max()
    np.exp(out, out=out)  # in place: a second array of V numbers would cost more than their exponentials
    return out


def only(logits: Array, ids: Array) -> Array:
    """Remove all tokens but some. logits (V,)."""
    out = np.full_like(logits, -np.inf)
    out[ids] = logits[ids]
    return out


def largest(values: Array, count: int) -> Array:
    """Find the largest numbers. values (n,)."""
    if count == len(values):
        return _all(count)
    groups = max(_GROUPS, 4 * count)
    rows = len(values) // groups
    if rows >= _ROWS:  # enough groups have a number at least as high as the floor, so all wanted are among those
        highest = values[: rows * groups].reshape(rows, groups).max(axis=0)
        near = np.flatnonzero(values >= np.partition(highest, groups - count)[groups - count])
        if len(near) < len(values) // _ROWS:
            return near[largest(values[near], count)]
    border = np.partition(values, len(values) - count)[len(values) - count]
    tied = np.flatnonzero(values == border)
    above = np.flatnonzero(values > border)
    return np.concatenate([above, tied[: count - len(above)]])
