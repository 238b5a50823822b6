"""Products with a weight that is narrower than the activations, widened by tiles that stay in cache, one thread a core.

Reading two bytes a number instead of four is what makes bfloat16 fast; widening the whole matrix first would undo it.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from refgemma.numerics import Array, Bfloat16Matrix, namespace_of

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


def _forget_threads() -> None:
    """After a fork: the child has none of its parent's threads, and its lock may be held by one of them."""
    global _one_at_a_time
    _one_at_a_time = threading.Lock()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def widened_product(x: Array, w: Array | Bfloat16Matrix) -> Array:
    """Product ``x W^T`` with a narrow weight, without ever holding the widened matrix.

    Parameters
    ----------
    x : ndarray, shape (rows, I)
        Activations, float32 or float64.
    w : ndarray or Bfloat16Matrix, shape (O, I)
        The weight, narrower than `x`.

    Returns
    -------
    ndarray, shape (rows, O)
        In the dtype of `x`.

    Raises
    ------
    ValueError
        If the weight is wider than the activations.
    """
    if namespace_of(x) is not np:  # tiles and threads are for the CPU
        return x @ _widen(w, x.dtype).T
    if not isinstance(w, Bfloat16Matrix):
        check_narrow(w, x.dtype)
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


def check_narrow(w: Array, dtype: np.dtype[Any]) -> None:
    """Refuse a weight that activations of this dtype cannot hold.

    Parameters
    ----------
    w : ndarray
        The weight.
    dtype : numpy.dtype
        Of the activations.

    Raises
    ------
    ValueError
        If the weight is wider.
    """
    if not np.can_cast(w.dtype, dtype):
        raise ValueError(f"the weight is {w.dtype}, wider than the activations, {dtype}: its digits would be lost")


def _widen(w: Array | Bfloat16Matrix, dtype: np.dtype[Any], rows: slice = slice(None)) -> Array:
    if isinstance(w, Bfloat16Matrix):
        return w.rows(rows, dtype)
    wide: Array = w[rows].astype(dtype)
    return wide
