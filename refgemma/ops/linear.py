"""Matrix products with a weight, ``y = x W^T``, for the kinds of operand a weight can be.

An array is multiplied as it is. A `Bfloat16Matrix` is widened tile by tile while it is multiplied, so that it never
stands in memory whole. An `Adapted` operand is one of these plus low-rank deltas, ``x W^T + scale (x A^T) B^T``.

Weights keep the checkpoint's (out, in) order: a row holds the weights of one output.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from threadpoolctl import ThreadpoolController

from refgemma.numerics import FLOAT32, Array, Bfloat16Matrix, Numerics, namespace_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """A low-rank change of one weight, ``scale * B A``, and the batch rows it applies to.

    Attributes
    ----------
    a : ndarray, shape (R, I)
        First factor, from the input down to the rank.
    b : ndarray, shape (O, R)
        Second factor, from the rank up to the output.
    scale : float
        Multiplies the product; the alpha / R of the LoRA paper.
    rows : ndarray of bool, shape (B,), or None
        Which rows of the batch it applies to; None means all.
    gain : ndarray, shape (O,), or None
        DoRA's factor for each output, magnitude over the norm of the changed row; None means 1.
    """

    a: Array
    b: Array
    scale: float
    rows: Array | None = None
    gain: Array | None = None


@dataclass(frozen=True, eq=False)
class Adapted:
    """A weight with low-rank deltas; the weight itself is left untouched.

    Attributes
    ----------
    base : ndarray or Bfloat16Matrix, shape (O, I)
        The weight.
    deltas : tuple of Delta
        Applied side by side: each is computed against the base, and their changes are summed.
    """

    base: Array | Bfloat16Matrix
    deltas: tuple[Delta, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base."""
        return self.base.shape


Operand: TypeAlias = Array | Bfloat16Matrix | Adapted


def linear(x: Array, w: Operand, *, numerics: Numerics = FLOAT32) -> Array:
    """Product of activations with a weight, ``x W^T``.

    Parameters
    ----------
    x : ndarray, shape (B, ..., I)
        Activations, float32 or float64.
    w : Operand, shape (O, I)
        The weight, in the dtype of `x` or a narrower one.
    numerics : Numerics
        Where values are rounded.

    Returns
    -------
    ndarray, shape (B, ..., O)
        In the dtype of `x`.

    Raises
    ------
    ValueError
        If the widths disagree, or the weight is wider than the activations.

    References
    ----------
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, eq. 3; Liu et al., "DoRA: Weight-Decomposed
    Low-Rank Adaptation", 2024, eq. 5.
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} channels, the weight has shape {w.shape}: expected (out, {x.shape[-1]})")
    if isinstance(w, Adapted):
        y = linear(x, w.base, numerics=numerics)
        low_rank = functools.partial(linear, numerics=numerics)
        return _with_deltas(y, w.deltas, lambda delta, rows: low_rank(low_rank(x[rows], delta.a), delta.b))
    flat = x.reshape(-1, x.shape[-1])
    if not isinstance(w, Bfloat16Matrix) and w.dtype == x.dtype:
        y = flat @ w.T
    else:
        y = _widened_product(flat, w)
    return numerics.round("linear", y.reshape(*x.shape[:-1], w.shape[0]))


def table_rows(tokens: Array, table: Operand, numerics: Numerics = FLOAT32) -> Array:
    """Rows of an embedding table, in the dtype of activations.

    Parameters
    ----------
    tokens : ndarray of int, shape (B, T)
        Token ids in ``[0, V)``.
    table : Operand, shape (V, D)
        The table. Deltas of an `Adapted` one hold `a` as (R, V) and `b` as (D, R).
    numerics : Numerics
        Dtype of the result; where values are rounded.

    Returns
    -------
    ndarray, shape (B, T, D)
        A copy.

    Raises
    ------
    ValueError
        If the table is wider than the activations.
    """
    if isinstance(table, Adapted):
        y = table_rows(tokens, table.base, numerics)

        def product(delta: Delta, rows: Any) -> Array:
            return linear(table_rows(tokens[rows], delta.a.T, numerics), delta.b, numerics=numerics)

        return _with_deltas(y, table.deltas, product)
    if isinstance(table, Bfloat16Matrix):
        return table.rows(tokens, numerics.dtype)
    _check_narrow(table, numerics.dtype)
    rows: Array = table[tokens].astype(numerics.dtype, copy=False)
    return rows


def _with_deltas(y: Array, deltas: Iterable[Delta], product: Any) -> Array:
    """`y` of the base plus what each delta changes; ``product(delta, rows)`` is the delta's unscaled output."""
    total = y.copy()
    for delta in deltas:
        rows = slice(None) if delta.rows is None else delta.rows
        change = product(delta, rows) * delta.scale
        if delta.gain is not None:
            change = (y[rows] + change) * delta.gain - y[rows]
        total[rows] += change
    return total


# ---- Weights narrower than the activations: widened by tiles that stay in cache, one thread a core.

# Numbers in one tile. Smaller ones lose to the interpreter, larger ones fall out of the second-level cache.
_TILE = 2**20

_one_at_a_time = threading.Lock()


@functools.cache
def _blas() -> tuple[ThreadpoolController, int]:
    """Handle on the BLAS library, and how many threads it was set up to use."""
    controller = ThreadpoolController()
    counts = [lib["num_threads"] for lib in controller.select(user_api="blas").info()]
    return controller, max(counts, default=os.cpu_count() or 1)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="refgemma-tile")


def _widened_product(x: Array, w: Array | Bfloat16Matrix) -> Array:
    """``x @ w.T`` for a narrow `w`, without ever holding the widened matrix."""
    if namespace_of(x) is not np:  # tiles and threads are for the CPU
        return x @ _widen(w, x.dtype).T
    if not isinstance(w, Bfloat16Matrix):
        _check_narrow(w, x.dtype)
    O, I = w.shape
    controller, threads = _blas()
    step = max(1, min(_TILE // I, math.ceil(O / threads)))
    out = np.empty((O, x.shape[0]), x.dtype)
    multiply = _tile_multiplier(x, w)

    def one(start: int) -> None:
        out[start : start + step] = multiply(slice(start, start + step))

    starts = range(0, O, step)
    # The tiles run side by side, so BLAS must not split each of them over the cores once more. That limit is the whole
    # process's, so products take turns: two at once would restore each other's, and leave BLAS on one thread for good.
    with _one_at_a_time, controller.limit(limits=1, user_api="blas"):
        if len(starts) == 1:
            one(0)
        else:
            list(_pool(threads).map(one, starts))
    return out.T


def _tile_multiplier(x: Array, w: Array | Bfloat16Matrix) -> Any:
    """Function from a slice of rows of `w` to their products with all of `x`, shape (rows, len(x))."""
    x_t = np.ascontiguousarray(x.T)
    if not isinstance(w, Bfloat16Matrix) or x.dtype != np.float32 or w.shape[1] % 2 or sys.byteorder != "little":
        return lambda rows: _widen(w, x.dtype, rows) @ x_t

    # Two neighbouring bfloat16 numbers, seen as one uint32: the odd column is its upper half, so masking the lower half
    # away leaves that column as float32; shifting it up gives the even one. Two integer operations, and no shuffling.
    pairs = w.bits.view(np.uint32)
    x_even, x_odd = np.ascontiguousarray(x_t[0::2]), np.ascontiguousarray(x_t[1::2])

    def multiply(rows: slice) -> Array:
        tile = np.left_shift(pairs[rows], np.uint32(16))
        y: Array = tile.view(np.float32) @ x_even
        np.bitwise_and(pairs[rows], np.uint32(0xFFFF0000), out=tile)
        y += tile.view(np.float32) @ x_odd
        return y

    return multiply


def _check_narrow(w: Array, dtype: np.dtype[Any]) -> None:
    if not np.can_cast(w.dtype, dtype):
        raise ValueError(f"the weight is {w.dtype}, wider than the activations, {dtype}: its digits would be lost")


def _widen(w: Array | Bfloat16Matrix, dtype: np.dtype[Any], rows: slice = slice(None)) -> Array:
    if isinstance(w, Bfloat16Matrix):
        return w.rows(rows, dtype)
    wide: Array = w[rows].astype(dtype)
    return wide
