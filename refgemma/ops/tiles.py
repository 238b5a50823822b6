"""Matrix products cut into tiles, which threads take side by side; narrow weights are widened tile by tile on the way.

Reading two bytes a number instead of four is what makes bfloat16 fast; widening the whole matrix first would undo it.

All products of a tile are `np.dot`: unlike `np.matmul`, it always lets go of the interpreter lock, however small its
result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from refgemma.numerics import Array, Bfloat16Matrix, from_bfloat16, namespace_of
from refgemma.ops.threads import in_parallel, threads

# Numbers in one tile, once it is widened: larger ones fall out of the second-level cache.
_TILE = 2**20

# Rows of a matrix that a thread takes at a time, if they are to be multiplied with many columns: BLAS prepares those
# anew each time, which would not pay for fewer rows.
_ROWS = 512

# Numbers for which it is worth waking a thread; eight multiplications take as long as reading one of them.
_WORTH = 2**17


def product(a: Array, b: Array) -> Array:
    """Matrix product, as ``a @ b``.

    Parameters
    ----------
    a : ndarray, shape (..., M, I)
        One matrix or a stack of them.
    b : ndarray, shape (..., I, J)
        As many, in the same dtype.

    Returns
    -------
    ndarray, shape (..., M, J)
        A new array.
    """
    M, I, J = *a.shape[-2:], b.shape[-1]
    hands = _hands(max(a.size, b.size), min(M, J))
    if hands == 1 or namespace_of(a) is not np:
        return a @ b
    stack = a.shape[:-2]
    matrices = list(np.ndindex(stack))
    out = np.empty((*stack, M, J), a.dtype)
    parts = _cut(max(M, J), I, min(M, J), hands=-(-hands // len(matrices)))
    places = [(index, part) for index in matrices for part in parts]
    # The longer side is cut. BLAS does best with the longer operand on the left, if its rows are rows in memory.
    turned = b.strides[-2] < b.strides[-1]

    def one(number: int) -> None:
        index, part = places[number]
        if M >= J:
            out[index][part] = np.dot(a[index][part], b[index])
        elif turned:
            out[index][:, part] = np.dot(b[index].T[part], a[index].T).T
        else:
            out[index][:, part] = np.dot(a[index], b[index][:, part])

    in_parallel(one, len(places))
    return out


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
    if not isinstance(w, Bfloat16Matrix):
        check_narrow(w, x.dtype)
    if namespace_of(x) is not np:  # tiles and threads are for the CPU
        return x @ _widen(w, x.dtype).T
    O, I = w.shape
    out = np.empty((len(x), O), x.dtype)
    multiply = _tile_multiplier(x, w)
    parts = _cut(O, I, len(x), hands=_hands(O * I, len(x)))
    width = max(2, _TILE // (parts[0].stop - parts[0].start) // 2 * 2)  # even, so that no pair of columns is torn
    columns = [slice(start, min(start + width, I)) for start in range(0, I, width)]

    def one(number: int) -> None:
        rows = parts[number]
        total = multiply(rows, columns[0])
        for block in columns[1:]:
            total += multiply(rows, block)
        out[:, rows] = total.T

    in_parallel(one, len(parts))
    return out


def _hands(numbers: int, columns: int) -> int:
    """Threads worth having for a product that reads so many numbers, each to be multiplied with some columns."""
    worth = numbers * (8 + columns) // (8 * _WORTH)
    return 1 if worth < 2 else min(threads(), worth)


def _cut(length: int, width: int, columns: int, *, hands: int) -> list[slice]:
    """Rows of a (length, width) matrix, to be multiplied with some columns, in parts: as many for each thread."""
    most = max(1 if columns == 1 else _ROWS, _TILE // width)
    rounds = -(-length // (hands * most))
    step = -(-length // (hands * rounds))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _tile_multiplier(x: Array, w: Array | Bfloat16Matrix) -> Callable[[slice, slice], Array]:
    """Function from slices of rows and columns of `w` to the products of that tile with `x`, shape (rows, len(x))."""
    if not isinstance(w, Bfloat16Matrix) or x.dtype != np.float32 or w.shape[1] % 2 or sys.byteorder != "little":
        return lambda rows, columns: np.dot(_widen(w, x.dtype, rows, columns), x[:, columns].T)

    # Two neighbouring bfloat16 numbers, seen as one uint32: the odd column is its upper half, so masking the lower half
    # away leaves that column as float32; shifting it up gives the even one. Two integer operations, and no shuffling.
    pairs = w.bits.view(np.uint32)
    x_even, x_odd = (np.ascontiguousarray(x[:, first::2]) for first in (0, 1))

    def multiply(rows: slice, columns: slice) -> Array:
        both = slice(columns.start // 2, columns.stop // 2)
        tile = np.left_shift(pairs[rows, both], np.uint32(16))
        y: Array = np.dot(tile.view(np.float32), x_even[:, both].T)
        np.bitwise_and(pairs[rows, both], np.uint32(0xFFFF0000), out=tile)
        y += np.dot(tile.view(np.float32), x_odd[:, both].T)
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


def _widen(
    w: Array | Bfloat16Matrix, dtype: np.dtype[Any], rows: slice = slice(None), columns: slice = slice(None)
) -> Array:
    tile = w.bits[rows, columns] if isinstance(w, Bfloat16Matrix) else w[rows, columns]
    wide: Array = (from_bfloat16(tile) if isinstance(w, Bfloat16Matrix) else tile).astype(dtype, copy=False)
    return wide
