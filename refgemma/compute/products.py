"""Matrix products cut into tiles, which threads take side by side; narrow weights are widened tile by tile on the way.

Reading two bytes per number instead of four is what makes bfloat16 fast; widening the whole matrix first would undo it.

All products of a tile are `np.dot`: unlike `np.matmul`, it always releases the interpreter lock, however small its
result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from refgemma.compute.threads import in_parallel, threads
from refgemma.errors import InputError
from refgemma.numerics import Array, Bfloat16Matrix, from_bfloat16, namespace_of

# Numbers in one widened tile: larger tiles fall out of the caches; with many small ones, threads wait for each other in
# Python, where only one runs at a time.
_TILE = 2**20

# Rows of a matrix that a thread takes at a time, if they are to be multiplied with many columns: BLAS prepares those
# anew each time, which would not pay for fewer rows. Half as many for narrow weights, which must be widened first.
_ROWS = 1024

# Rows of weights from which on it pays to transpose the activations in memory first: BLAS is then a few percent faster.
_WORTH_TURNING = 2**13

# Rows that are transposed at a time. Their distance in memory is often a power of two: numbers of one column then
# share a set of the first cache, which holds few of them.
_TURNED = 8

# Numbers for which it is worth waking a thread; eight multiplications take as long as reading one of them.
_WORTH = 2**17


def product(a: Array, b: Array) -> Array:
    """Matrix product, as ``a @ b``, of two matrices or two stacks of them; a new array."""
    M, I, J = *a.shape[-2:], b.shape[-1]
    workers = _workers(max(a.size, b.size), min(M, J))
    if workers == 1 or namespace_of(a) is not np:
        return a @ b
    matrices = list(np.ndindex(a.shape[:-2]))
    out = np.empty((*a.shape[:-1], J), a.dtype)
    most = max(1 if min(M, J) == 1 else _ROWS // 2, _TILE // I)
    parts = _cut(max(M, J), most, workers=-(-workers // len(matrices)))
    jobs = [(index, part) for index in matrices for part in parts]
    # The longer side is cut. BLAS does best with the longer operand on the left, if its rows are rows in memory.
    transposed = b.strides[-2] < b.strides[-1]

    def one(job: int) -> None:
        index, part = jobs[job]
        if M >= J:
            out[index][part] = np.dot(a[index][part], b[index])
        elif transposed:
            out[index][:, part] = np.dot(b[index].T[part], a[index].T).T
        else:
            out[index][:, part] = np.dot(a[index], b[index][:, part])

    in_parallel(one, len(jobs))
    return out


def times_transposed(x: Array, weights: Sequence[Array | Bfloat16Matrix], *, columns: bool = False) -> list[Array]:
    """``x W^T`` for each of some weights: the same activations (rows, I), weights (O, I) of any O, products (rows, O).

    Weights are in the dtype of `x` or a narrower one. With `columns`, a column of the results may be contiguous in
    memory, which is how BLAS makes it, instead of a row. Threads are called together once for all weights: waking them,
    and waiting for the last, takes as long as multiplying a small one.
    """
    plain = [w for w in weights if not isinstance(w, Bfloat16Matrix)]
    wide = [w for w in plain if w.dtype == x.dtype]
    if len(wide) < len(plain):
        for w in plain:
            check_narrow(w, x.dtype)
    lengths = [w.shape[0] for w in weights]
    workers = _workers(sum(lengths) * x.shape[1], len(x))
    if len(wide) == len(weights):
        if workers == 1:
            return [x @ w.T for w in wide]
        if len(x) > sum(lengths):  # then there is more to cut in `x`
            return [product(x, w.T) for w in wide]
    if namespace_of(x) is not np:  # tiles and threads are for the CPU
        return [x @ _widen(w, x.dtype).T for w in weights]
    outs = [np.empty((len(x), length), x.dtype, order="F" if columns else "C") for length in lengths]
    fewest = 1 if len(x) == 1 else _ROWS if len(wide) == len(weights) else _ROWS // 2
    parts = _parts(tuple(lengths), max(fewest, _TILE // x.shape[1]), workers)
    if sum(lengths) >= _WORTH_TURNING:
        x = _by_columns(x)
    in_parallel(lambda number: _multiply(x, weights, parts[number], outs), len(parts))
    return outs


def check_narrow(w: Array, dtype: np.dtype[Any]) -> None:
    """Refuse a weight that activations of this dtype cannot hold."""
    if not np.can_cast(w.dtype, dtype):
        raise InputError(f"the weight is {w.dtype}, wider than the activations, {dtype}: its digits would be lost")


def _workers(numbers: int, columns: int) -> int:
    """Threads worth using for a product that reads this many numbers and multiplies each with some columns."""
    worth = numbers * (8 + columns) // (8 * _WORTH)
    return 1 if worth < 2 else min(threads(), worth)


def _cut(length: int, most: int, *, workers: int) -> list[slice]:
    """Some rows in parts of about `most`, the same number and size of parts for each worker.

    A quarter more rows in each are better than one more part for every worker.
    """
    rounds = max(1, math.ceil(length / (workers * most) - 1 / 4))
    step = -(-length // (workers * rounds))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


@functools.lru_cache
def _parts(lengths: tuple[int, ...], most: int, workers: int) -> list[list[tuple[int, slice]]]:
    """Parts of matrices stacked on each other: for each part which matrices it touches, and which of their rows.

    Remembered, because the other threads wait for it; a model has few shapes.
    """
    parts = []
    for cut in _cut(sum(lengths), most, workers=workers):
        part, start = [], 0
        for which, length in enumerate(lengths):
            rows = slice(max(cut.start - start, 0), min(cut.stop - start, length))
            if rows.start < rows.stop:
                part.append((which, rows))
            start += length
        parts.append(part)
    return parts


def _by_columns(x: Array) -> Array:
    """The same numbers with contiguous columns, which BLAS reads fastest if it does so again and again."""
    if x.flags.f_contiguous:
        return x
    turned = np.empty(x.shape[::-1], x.dtype)
    for start in range(0, len(x), _TURNED):
        turned[:, start : start + _TURNED] = x[start : start + _TURNED].T
    return turned.T


def _multiply(
    x: Array, weights: Sequence[Array | Bfloat16Matrix], part: list[tuple[int, slice]], outs: list[Array]
) -> None:
    """Compute those columns of each ``x W^T`` that come from the rows in this part."""
    I = x.shape[1]
    for which, rows in part:
        w, out = weights[which], outs[which]
        if isinstance(w, Bfloat16Matrix) or w.dtype != x.dtype:
            width = I if len(x) == 1 else max(1, _TILE // (rows.stop - rows.start))
            tile = _widen(w, x.dtype, rows, slice(0, width))
        else:
            width, tile = I, w[rows]
        if len(x) == 1:  # with as little Python as possible: while one thread runs it, the others wait for its lock
            np.dot(tile, x[0], out=out[0, rows])
            continue
        target = out[:, rows].T
        total = target if target.flags.c_contiguous else np.empty(target.shape, target.dtype)
        np.dot(tile, x[:, :width].T, out=total)
        for start in range(width, I, width):
            columns = slice(start, start + width)
            total += np.dot(_widen(w, x.dtype, rows, columns), x[:, columns].T)
        if total is not target:
            target[...] = total


def _widen(
    w: Array | Bfloat16Matrix, dtype: np.dtype[Any], rows: slice = slice(None), columns: slice = slice(None)
) -> Array:
    tile: Array = from_bfloat16(w.bits[rows, columns]) if isinstance(w, Bfloat16Matrix) else w[rows, columns]
    return tile.astype(dtype, copy=False)
