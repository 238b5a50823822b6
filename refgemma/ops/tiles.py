"""Matrix products cut into tiles, which threads take side by side; narrow weights are widened tile by tile on the way.

Reading two bytes a number instead of four is what makes bfloat16 fast; widening the whole matrix first would undo it.

All products of a tile are `np.dot`: unlike `np.matmul`, it always lets go of the interpreter lock, however small its
result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import Array, Bfloat16Matrix, from_bfloat16, namespace_of
from refgemma.ops.threads import in_parallel, threads

# Numbers in one tile, once it is widened: larger ones fall out of the caches, and smaller ones are so many that threads
# wait for each other in Python, where only one goes on at a time.
_TILE = 2**20

# Rows of a matrix that a thread takes at a time, if they are to be multiplied with many columns: BLAS prepares those
# anew each time, which would not pay for fewer rows. Of a narrow matrix half as many: they are to be widened, too.
_ROWS = 1024

# Rows of weights from which on it pays to turn the activations around first: BLAS then computes some percent faster.
_WORTH_TURNING = 2**13

# Rows that are turned around at a time. Their distance in memory is often a power of two: numbers of one column then
# share a place in the first cache, which has few of those.
_TURNED = 8

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
    most = _most(I, 1 if min(M, J) == 1 else _ROWS // 2)
    parts = _cut(max(M, J), most, hands=-(-hands // len(matrices)))
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


def weighted(x: Array, weights: Sequence[Array | Bfloat16Matrix], *, columns: bool = False) -> list[Array]:
    """Products ``x W^T`` of the same activations with some weights, side by side.

    Parameters
    ----------
    x : ndarray, shape (rows, I)
        Activations, float32 or float64.
    weights : sequence of ndarray or Bfloat16Matrix, shape (O, I)
        Each in the dtype of `x` or a narrower one, and with an O of its own.
    columns : bool
        Whether a column may lie in one piece in memory, which is how BLAS makes it, and not a row.

    Returns
    -------
    list of ndarray, shape (rows, O)
        One for each weight, in the dtype of `x`.

    Raises
    ------
    ValueError
        If a weight is wider than the activations.

    Notes
    -----
    Threads are called together once for all weights: waking them, and waiting for the last, takes as long as
    multiplying a small one. A narrow weight is never held widened.
    """
    wide: list[Array] = []
    for w in weights:
        if isinstance(w, Bfloat16Matrix):
            continue
        if w.dtype == x.dtype:
            wide.append(w)
        else:
            check_narrow(w, x.dtype)
    lengths = [w.shape[0] for w in weights]
    hands = _hands(sum(lengths) * x.shape[1], len(x))
    if len(wide) == len(weights):
        if hands == 1:
            return [x @ w.T for w in wide]
        if len(x) > sum(lengths):  # then there is more to cut in `x`
            return [product(x, w.T) for w in wide]
    if namespace_of(x) is not np:  # tiles and threads are for the CPU
        return [x @ _widen(w, x.dtype).T for w in weights]
    outs = [np.empty((len(x), length), x.dtype, order="F" if columns else "C") for length in lengths]
    fewest = 1 if len(x) == 1 else _ROWS if len(wide) == len(weights) else _ROWS // 2
    parts = _pieces(tuple(lengths), _most(x.shape[1], fewest), hands)
    if sum(lengths) >= _WORTH_TURNING:
        x = _by_columns(x)

    def one(number: int) -> None:
        for which, rows in parts[number]:
            _multiply(x, weights[which], rows, out=outs[which])

    in_parallel(one, len(parts))
    return outs


def _hands(numbers: int, columns: int) -> int:
    """Threads worth having for a product that reads so many numbers, each to be multiplied with some columns."""
    worth = numbers * (8 + columns) // (8 * _WORTH)
    return 1 if worth < 2 else min(threads(), worth)


def _most(width: int, fewest: int) -> int:
    """Rows of a matrix that make a part: a tile, or `fewest` of them if that is more."""
    return max(fewest, _TILE // width)


def _cut(length: int, most: int, *, hands: int) -> list[slice]:
    """Parts of some rows, as many and as large for each thread.

    A quarter more rows in each are better than one more part for every thread.
    """
    rounds = max(1, math.ceil(length / (hands * most) - 1 / 4))
    step = -(-length // (hands * rounds))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


@functools.lru_cache
def _pieces(lengths: tuple[int, ...], most: int, hands: int) -> list[list[tuple[int, slice]]]:
    """Parts of matrices on top of each other: for each part which matrices it touches, and which of their rows.

    Remembered, because the other threads wait for it; a model has few shapes.
    """
    return [list(_within(part, lengths)) for part in _cut(sum(lengths), most, hands=hands)]


def _within(part: slice, lengths: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """Rows of some matrices on top of each other: which matrix, and which of its rows."""
    start = 0
    for which, length in enumerate(lengths):
        rows = slice(max(part.start - start, 0), min(part.stop - start, length))
        if rows.start < rows.stop:
            yield which, rows
        start += length


def _by_columns(x: Array) -> Array:
    """The same numbers with each column in one piece: as BLAS reads them fastest, if it does so again and again."""
    if x.flags.f_contiguous:
        return x
    turned = np.empty(x.shape[::-1], x.dtype)
    for start in range(0, len(x), _TURNED):
        turned[:, start : start + _TURNED] = x[start : start + _TURNED].T
    return turned.T


def _multiply(x: Array, w: Array | Bfloat16Matrix, rows: slice, *, out: Array) -> None:
    """Compute those columns of ``x W^T`` that come from some rows of `w`."""
    if len(x) == 1:  # with as little Python as can be: while one thread is in it, the others wait for its lock
        np.dot(_widen(w, x.dtype, rows), x[0], out=out[0, rows])
        return
    I = x.shape[1]
    wide = not isinstance(w, Bfloat16Matrix) and w.dtype == x.dtype
    width = I if wide else max(1, _TILE // (rows.stop - rows.start))
    part = out[:, rows].T
    total = part if part.flags.c_contiguous else np.empty(part.shape, part.dtype)
    np.dot(_widen(w, x.dtype, rows, slice(0, width)), x[:, :width].T, out=total)
    for start in range(width, I, width):
        columns = slice(start, start + width)
        total += np.dot(_widen(w, x.dtype, rows, columns), x[:, columns].T)
    if total is not part:
        part[...] = total


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
        raise InputError(f"the weight is {w.dtype}, wider than the activations, {dtype}: its digits would be lost")


def _widen(
    w: Array | Bfloat16Matrix, dtype: np.dtype[Any], rows: slice = slice(None), columns: slice = slice(None)
) -> Array:
    wide: Array = from_bfloat16(w.bits[rows, columns]) if isinstance(w, Bfloat16Matrix) else w[rows, columns]
    return wide if wide.dtype == dtype else wide.astype(dtype)
