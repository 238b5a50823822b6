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
    """Keys and values of every layer, for a batch of rows, up to a fixed number of slots.

    One slot is used for every token fed, padding included. Memory is claimed as slots fill, or on a GPU at once.
    """

    def __init__(self, config: Config, *, batch: int, capacity: int, dtype: Any = np.float32, xp: Any = np) -> None:
        # Of each layer (B, K, capacity, H), keys after RoPE; slots from `length` on hold nothing.
        shapes = [(batch, layer.num_kv_heads, capacity, layer.head_dim) for layer in config.layers]
        self.keys: list[Array] = [xp.empty(shape, dtype) for shape in shapes]
        self.values: list[Array] = [xp.empty(shape, dtype) for shape in shapes]
        self.positions: Array = xp.full((batch, capacity), -1)  # (B, capacity); -1 for padding and for empty slots
        self.length = 0  # filled slots, the same for every row
        self._shared = False  # whether the arrays are views of another cache

    @property
    def dtype(self) -> Any:
        """Of keys and values, that of activations."""
        return self.keys[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, filled or not."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def fork(self, length: int, *, batch: int, capacity: int) -> KVCache:
        """Start a cache with the first slots of this one, which has one row.

        It shares arrays with this one until it is extended, when it copies them. This one may be extended meanwhile,
        but not truncated below `length`.
        """
        if len(self.positions) != 1 or not 0 <= length <= self.length or length > capacity:
            raise InputError(
                f"cannot begin a cache of {capacity} slots with {length} of one that has {len(self.positions)} rows "
                f"and {self.length} slots filled: expected one row, and enough slots in both"
            )
        fork: KVCache = object.__new__(KVCache)
        xp = namespace_of(self.positions)

        def first(array: Array) -> Array:
            _, K, _, H = array.shape
            view: Array = xp.broadcast_to(array[:, :, :length], (batch, K, length, H))
            return view

        fork.keys, fork.values = [first(array) for array in self.keys], [first(array) for array in self.values]
        fork.positions = xp.full((batch, capacity), -1)
        fork.positions[:, :length] = self.positions[:, :length]
        fork.length = length
        fork._shared = True
        return fork

    def next_positions(self, count: int) -> Array:
        """Positions (B, count) of the next tokens of every row, counting on from its last real one."""
        last = self.positions.max(axis=1, keepdims=True)
        following: Array = last + 1 + namespace_of(last).arange(count)
        return following

    def extend(self, positions: Array) -> None:
        """Take the next slots for tokens at positions (B, T)."""
        B, capacity = self.positions.shape
        if positions.shape[0] != B:
            raise InputError(f"tokens have {positions.shape[0]} rows, the cache was made for {B}")
        here, there = namespace_of(self.positions).__name__, namespace_of(positions).__name__
        if here != there:
            raise InputError(f"the cache is in {here} arrays, the model computes with {there}: make it with xp={there}")
        end = self.length + positions.shape[1]
        if end > capacity:
            raise InputError(
                f"the cache has {capacity} slots, {self.length} of them filled: no room for {positions.shape[1]} more"
            )
        if self._shared:
            self.keys, self.values = ([self._own(x) for x in arrays] for arrays in (self.keys, self.values))
            self._shared = False
        self.positions[:, self.length : end] = positions
        self.length = end

    def _own(self, shared: Array) -> Array:
        """A copy with room for all slots."""
        B, K, _, H = shared.shape
        own: Array = namespace_of(shared).empty((B, K, self.positions.shape[1], H), shared.dtype)
        own[:, :, : self.length] = shared[:, :, : self.length]
        return own

    def update(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Store k and v (B, T, K, H) of one layer in the slots taken last; return all its own so far, (B, K, S, H)."""
        keys, values = self.keys[layer], self.values[layer]
        if k.dtype != keys.dtype:
            raise InputError(f"keys are {k.dtype}, the cache holds {keys.dtype}: make it with the dtype of activations")
        new = slice(self.length - k.shape[1], self.length)
        keys[:, :, new] = k.swapaxes(1, 2)
        values[:, :, new] = v.swapaxes(1, 2)
        return keys[:, :, : self.length], values[:, :, : self.length]

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on."""
        if not 0 <= length <= self.length:
            raise InputError(f"cannot keep {length} slots: {self.length} are filled")
        self.positions[:, length:] = -1
        self.length = length

    def __repr__(self) -> str:
        B, capacity = self.positions.shape
        filled = to_host(self.positions[:, : self.length])
        rows = "\n".join(f"  row {b}: {_ranges(row)}" for b, row in enumerate(filled))
        shapes = {f"{keys.shape[1]} heads x {keys.shape[3]}": None for keys in self.keys}
        per_slot = sum(2 * B * keys.shape[1] * keys.shape[3] * keys.itemsize for keys in self.keys)
        return (
            f"KVCache: {len(self.keys)} layers x {B} rows x {' or '.join(shapes)}, {self.dtype}\n"
            f"  {self.length} of {capacity} slots filled, {per_slot * self.length:,} of {per_slot * capacity:,} bytes\n"
            f"{rows}"
        )


def join_rows(rows: Sequence[tuple[KVCache, int]], config: Config, *, capacity: int) -> KVCache:
    """Cache of a new batch, copied from rows of other caches.

    All rows end together; slots before the first real one of a row are dropped.
    """
    firsts = [int((cache.positions[row, : cache.length] >= 0).argmax()) for cache, row in rows]
    counts = [cache.length - first for (cache, _), first in zip(rows, firsts, strict=True)]
    longest = max(counts)
    xp = namespace_of(rows[0][0].positions)
    batch = KVCache(config, batch=len(rows), capacity=capacity, dtype=rows[0][0].dtype, xp=xp)
    batch.extend(xp.full((len(rows), longest), -1))
    for b, ((cache, row), first, count) in enumerate(zip(rows, firsts, counts, strict=True)):
        old, new, none = slice(first, cache.length), slice(longest - count, longest), slice(longest - count)
        batch.positions[b, new] = cache.positions[row, old]
        for source, target in zip((*cache.keys, *cache.values), (*batch.keys, *batch.values), strict=True):
            target[b, :, new] = source[row, :, old]
            target[b, :, none] = 0  # never attended to, but even a weight of zero times NaN is NaN
    return batch


class PrefixCache:
    """Keys and values of the last run of one row, so that a prompt with the same beginning need not be read again.

    It serves a chat, where every prompt begins with all earlier turns, or a long beginning that many prompts share. It
    holds a plain `KVCache`, which every run forks: runs may overlap without disturbing each other. A run with other
    weights or other arithmetic starts afresh.

    Attributes
    ----------
    tokens : list of int
        Tokens fed so far, in order; slot i of the cache holds token i.
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
            Weights; others, such as those of an adapter, make other keys.
        config : Config
            Shape of the model.
        numerics : Numerics
            Arithmetic of activations.
        xp : module, default numpy
            Array library of the weights.

        Returns
        -------
        cache : KVCache
            With room for the whole context; its `length` is the number of prompt tokens it holds.
        fed : list of int
            Its tokens. A caller that feeds the cache more tokens appends them here afterwards.
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
