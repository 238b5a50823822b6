"""Keys and values of the tokens read so far, with the absolute position of each.

Attention builds its mask from the positions stored here, so a slot that holds padding (position -1) is simply never
seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refgemma.config import Config
from refgemma.numerics import Array, Numerics


class KVCache:
    """Keys and values of every layer, for a batch of rows, up to a fixed number of slots.

    Parameters
    ----------
    config : Config
        Gives L, K and H.
    batch : int
        Rows, B.
    capacity : int
        Slots a row; one is used for every token fed, padding included. Memory is claimed as slots fill.
    dtype : dtype, default float32
        Of keys and values, the dtype of activations.

    Attributes
    ----------
    keys, values : ndarray, shape (L, B, K, capacity, H)
        Keys after RoPE, and values. Slots from `length` on hold nothing.
    positions : ndarray of int, shape (B, capacity)
        Absolute position in each slot; -1 for padding and for empty slots.
    length : int
        Filled slots, the same for every row.
    """

    def __init__(self, config: Config, *, batch: int, capacity: int, dtype: Any = np.float32) -> None:
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        self.keys: Array = np.empty(shape, dtype)
        self.values: Array = np.empty(shape, dtype)
        self.positions: Array = np.full((batch, capacity), -1)
        self.length = 0

    def next_positions(self, count: int) -> Array:
        """Positions of the next tokens of every row, counting on from its last real one.

        Parameters
        ----------
        count : int
            How many tokens.

        Returns
        -------
        ndarray of int, shape (B, count)
            Absolute positions.
        """
        last = self.positions.max(axis=1, initial=-1, keepdims=True)
        following: Array = last + 1 + np.arange(count)
        return following

    def extend(self, positions: Array) -> None:
        """Take the next slots for tokens at these positions.

        Parameters
        ----------
        positions : ndarray of int, shape (B, T)
            Absolute positions, -1 for padding.

        Raises
        ------
        ValueError
            If the rows disagree with the cache, or its slots do not suffice.
        """
        B, capacity = self.positions.shape
        if positions.shape[0] != B:
            raise ValueError(f"tokens have {positions.shape[0]} rows, the cache was made for {B}")
        end = self.length + positions.shape[1]
        if end > capacity:
            raise ValueError(
                f"the cache has {capacity} slots, {self.length} of them filled: no room for {positions.shape[1]} more"
            )
        self.positions[:, self.length : end] = positions
        self.length = end

    def update(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Store one layer's keys and values in the slots taken last; return all of that layer so far.

        Parameters
        ----------
        layer : int
            Which layer, from 0.
        k, v : ndarray, shape (B, T, K, H)
            Of the tokens fed in this call.

        Returns
        -------
        keys, values : ndarray, shape (B, K, S, H)
            Views of the cache, S = `length`.

        Raises
        ------
        ValueError
            If keys and cache differ in dtype.
        """
        if k.dtype != self.keys.dtype:
            raise ValueError(
                f"keys are {k.dtype}, the cache holds {self.keys.dtype}: make it with the dtype of activations"
            )
        new = slice(self.length - k.shape[1], self.length)
        self.keys[layer, :, :, new] = k.swapaxes(1, 2)
        self.values[layer, :, :, new] = v.swapaxes(1, 2)
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on.

        Parameters
        ----------
        length : int
            Slots to keep, at most as many as are filled.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} slots: {self.length} are filled")
        self.positions[:, length:] = -1
        self.length = length

    def __repr__(self) -> str:
        L, B, K, capacity, H = self.keys.shape
        filled = self.positions[:, : self.length]
        rows = "\n".join(f"  row {b}: {_ranges(row)}" for b, row in enumerate(filled))
        per_slot = 2 * L * B * K * H * self.keys.itemsize
        return (
            f"KVCache: {L} layers x {B} rows x {K} heads x {H}, {self.keys.dtype}\n"
            f"  {self.length} of {capacity} slots filled, {per_slot * self.length:,} of {per_slot * capacity:,} bytes\n"
            f"{rows}"
        )


class PrefixCache:
    """Keys and values of the last run of one row, so that a prompt which begins like it need not be read again.

    A chat is the use: every turn's prompt begins with all that went before. A run with other weights or other
    arithmetic starts afresh.

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

    def resume(self, prompt: Sequence[int], params: object, config: Config, numerics: Numerics) -> KVCache:
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

        Returns
        -------
        KVCache
            With room for the whole context; `length` tells how much of the prompt it holds.
        """
        if self._cache is None or self._params is not params or self._numerics != numerics:
            self._cache = KVCache(config, batch=1, capacity=config.max_positions, dtype=numerics.dtype)
            self._params, self._numerics = params, numerics
            self.tokens = []
        same = 0
        for ours, theirs in zip(self.tokens, prompt[:-1], strict=False):
            if ours != theirs:
                break
            same += 1
        self._cache.truncate(same)
        self.tokens = self.tokens[:same]  # a new list, by which an abandoned run can tell that it was taken over
        return self._cache


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
