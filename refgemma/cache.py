"""Keys and values of the tokens read so far, with the absolute position of each.

Attention builds its mask from the positions stored here, so a slot that holds padding (position -1) is simply never
seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refgemma.config import Config
from refgemma.errors import InputError
from refgemma.numerics import Array, Numerics, namespace_of, to_host


class KVCache:
    """Keys and values of every layer, for a batch of rows, up to a fixed number of slots."""

    def __init__(self, config: Config, *, batch: int, capacity: int, dtype: Any = np.float32, xp: Any = np) -> None:
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        self.keys: Array = xp.empty(shape, dtype)
        self.values: Array = xp.empty(shape, dtype)
        self.positions: Array = xp.full((batch, capacity), -1)
        self.length = 0  # filled slots, the same for every row
        self._shared = False  # whether the arrays are views of another cache

    def fork(self, length: int, *, batch: int, capacity: int) -> KVCache:
        """Cache that begins with the first slots of this one, which has one row, and goes on by itself."""
        if len(self.positions) != 1 or not 0 <= length <= self.length or length > capacity:
            raise InputError(
                f"cannot begin a cache of {capacity} slots with {length} of one that has {len(self.positions)} rows "
                f"and {self.length} slots filled: expected one row, and enough slots in both"
            )
        fork: KVCache = object.__new__(KVCache)
        xp = namespace_of(self.keys)
        L, _, K, _, H = self.keys.shape
        fork.keys, fork.values = (
            xp.broadcast_to(array[:, :, :, :length], (L, batch, K, length, H)) for array in (self.keys, self.values)
        )
        fork.positions = xp.full((batch, capacity), -1)
        fork.positions[:, :length] = self.positions[:, :length]
        fork.length = length
        fork._shared = True
        return fork

    def next_positions(self, count: int) -> Array:
        """Positions of the next tokens of every row, counting on from its last real one."""
        last = self.positions.max(axis=1, keepdims=True)
        following: Array = last + 1 + namespace_of(last).arange(count)
        return following

    def extend(self, positions: Array) -> None:
        """Take the next slots for tokens at these positions. positions (B, T)."""
        B, capacity = self.positions.shape
        if positions.shape[0] != B:
            raise InputError(f"tokens have {positions.shape[0]} rows, the cache was made for {B}")
        ours, theirs = namespace_of(self.positions).__name__, namespace_of(positions).__name__
        if ours != theirs:
            raise InputError(
                f"the cache is in {ours} arrays, the model computes with {theirs}: make it with xp={theirs}"
            )
        end = self.length + positions.shape[1]
        if end > capacity:
            raise InputError(
                f"the cache has {capacity} slots, {self.length} of them filled: no room for {positions.shape[1]} more"
            )
        if self._shared:
            self._own()
        self.positions[:, self.length : end] = positions
        self.length = end

    def _own(self) -> None:
        """Copy what is shared with another cache."""
        xp = namespace_of(self.keys)
        L, B, K, _, H = self.keys.shape
        for name in ("keys", "values"):
            theirs = getattr(self, name)
            ours = xp.empty((L, B, K, self.positions.shape[1], H), theirs.dtype)
            ours[:, :, :, : self.length] = theirs[:, :, :, : self.length]
            setattr(self, name, ours)
        self._shared = False

    def update(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Store one layer's keys and values in the slots taken last; return all of that layer so far.

        k, v (B, T, K, H) -> keys, values (B, K, S, H).
        """
        if k.dtype != self.keys.dtype:
            raise InputError(
                f"keys are {k.dtype}, the cache holds {self.keys.dtype}: make it with the dtype of activations"
            )
        new = slice(self.length - k.shape[1], self.length)
        self.keys[layer, :, :, new] = k.swapaxes(1, 2)
        self.values[layer, :, :, new] = v.swapaxes(1, 2)
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on."""
        if not 0 <= length <= self.length:
            raise InputError(f"cannot keep {length} slots: {self.length} are filled")
        self.positions[:, length:] = -1
        self.length = length

    def __repr__(self) -> str:
        L, B, K, _, H = self.keys.shape
        capacity = self.positions.shape[1]
        filled = to_host(self.positions[:, : self.length])
        rows = "\n".join(f"  row {b}: {_ranges(row)}" for b, row in enumerate(filled))
        per_slot = 2 * L * B * K * H * self.keys.itemsize
        return (
            f"KVCache: {L} layers x {B} rows x {K} heads x {H}, {self.keys.dtype}\n"
            f"  {self.length} of {capacity} slots filled, {per_slot * self.length:,} of {per_slot * capacity:,} bytes\n"
            f"{rows}"
        )


def side_by_side(rows: Sequence[tuple[KVCache, int]], config: Config, *, capacity: int) -> KVCache:
    """Cache of a new batch, made of rows of other caches."""
    firsts = [int((cache.positions[row, : cache.length] >= 0).argmax()) for cache, row in rows]
    counts = [cache.length - first for (cache, _), first in zip(rows, firsts, strict=True)]
    longest = max(counts)
    xp = namespace_of(rows[0][0].keys)
    batch = KVCache(config, batch=len(rows), capacity=capacity, dtype=rows[0][0].keys.dtype, xp=xp)
    batch.extend(xp.full((len(rows), longest), -1))
    for b, ((cache, row), first, count) in enumerate(zip(rows, firsts, counts, strict=True)):
        old, new, none = slice(first, cache.length), slice(longest - count, longest), slice(longest - count)
        batch.positions[b, new] = cache.positions[row, old]
        for theirs, ours in ((cache.keys, batch.keys), (cache.values, batch.values)):
            ours[:, b, :, new] = theirs[:, row, :, old]
            ours[:, b, :, none] = 0  # never attended to, but even a weight of zero times NaN is NaN
    return batch


class PrefixCache:
    """What the last run of one row read and wrote, so that a prompt which begins like it need not be read again.

    A chat is one use: every turn's prompt begins with all that went before. Another is a long beginning that many
    prompts share. It holds a plain `KVCache`, of which every run forks its own: runs may overlap, and none disturbs
    another. A run with other weights or other arithmetic starts afresh.

    Attributes
    ----------
    tokens : list of int
        What has been fed, in order; slot i of the cache holds token i.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._cache: KVCache | None = None
        self._params: object | None = None
        self._numerics: Numerics | None = None

    def resume(
        self, prompt: Sequence[int], params: object, config: Config, numerics: Numerics, *, xp: Any = np
    ) -> tuple[KVCache, list[int]]:
        """Cache that holds the longest beginning of the prompt that was fed before.

        Parameters
        ----------
        prompt : sequence of int
            Token ids; at least the last one is left to be fed.
        params : Params
            Weights; others, of an adapter say, make other keys.
        config : Config
            Shape of the model.
        numerics : Numerics
            Arithmetic of activations.
        xp : module, default numpy
            Array library of the weights.

        Returns
        -------
        cache : KVCache
            With room for the whole context; `length` tells how much of the prompt it holds.
        fed : list of int
            Its tokens. Whoever feeds the cache more appends them here, once they are in it.
        """
        old = self._cache
        if old is None or self._params is not params or self._numerics != numerics:
            old = KVCache(config, batch=1, capacity=config.max_positions, dtype=numerics.dtype, xp=xp)
            self._params, self._numerics = params, numerics
            self.tokens = []
        same = in_common([self.tokens, prompt[:-1]])
        self._cache = old.fork(same, batch=1, capacity=config.max_positions)
        self.tokens = self.tokens[:same]  # a new list: the run before may still append to its own
        return self._cache, self.tokens


def in_common(texts: Sequence[Sequence[int]]) -> int:
    """Count the tokens with which all texts begin."""
    same = 0
    for tokens in zip(*texts, strict=False):
        if len(set(tokens)) > 1:
            break
        same += 1
    return same


def _ranges(positions: Array) -> str:
    """Positions as runs: ``2 x padding, 0-6`` rather than a list of hundreds."""
    if not len(positions):
        return "empty"
    steps = np.where(positions[:-1] < 0, positions[1:] >= 0, positions[1:] != positions[:-1] + 1)
    runs = np.split(positions, np.flatnonzero(steps) + 1)
    return ", ".join(map(_run, runs))


def _run(run: Array) -> str:
    if run[0] < 0:
        return f"{len(run)} x padding"
    return f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}"
