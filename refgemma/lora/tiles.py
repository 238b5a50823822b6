"""Weights by tiles of rows: widened to float64 to compute with, and rounded once to the format they are stored in.

Rounding once takes care: NumPy has no bfloat16, and by way of float32 a number is rounded twice, which goes wrong where
the first rounding makes a tie for the second. So the first one rounds to odd, which never makes a tie.

References
----------
Boldo and Melquiond, "Emulation of a FMA and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd", IEEE
Transactions on Computers 57, 2008, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from refgemma.numerics import Array, Bfloat16Matrix, from_bfloat16, to_bfloat16, to_host
from refgemma.ops.linear import Adapted, Operand

Plain: TypeAlias = Array | Bfloat16Matrix

FORMATS = ("bfloat16", "float16", "float32", "float64")
TILE = 2**18  # numbers; the half dozen float64 arrays of one tile are 2 MB each and stay in cache


def tiles(shape: tuple[int, ...], rows: slice | None = None, numbers: int | None = None) -> Iterator[slice]:
    """The rows of a matrix, or some of them, cut into tiles of about `numbers` numbers."""
    rows = slice(0, shape[0]) if rows is None else rows
    step = max(1, (numbers or TILE) // (shape[1] if len(shape) > 1 else 1))
    return (slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step))


def wide_rows(weight: Plain, rows: slice) -> Array:
    """Rows of a weight in float64."""
    with np.errstate(invalid="ignore"):  # a NaN stays one, signalling or not
        if isinstance(weight, Bfloat16Matrix):
            return to_host(weight.rows(rows, np.dtype(np.float64)))
        return to_host(weight[rows]).astype(np.float64)


def rounded(wide: Array, form: str) -> Array:
    """Nearest numbers of a format, ties to even, rounded once; bfloat16 as bits."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return to_bfloat16(_rounded_to_odd(wide)) if form == "bfloat16" else wide.astype(form)


def _rounded_to_odd(wide: Array) -> Array:
    """float32, where what is not exact gets an odd last bit: never a bfloat16 number, and never halfway between two."""
    near = wide.astype(np.float32)
    bits = near.view(np.uint32)
    size, near_size = np.abs(wide), np.abs(near.astype(np.float64))
    # Of the two float32 numbers around an inexact one, the odd one; the nearest may be on either side of it. The bits
    # of a float count its size upwards, through subnormal numbers and up to infinity, whose neighbour is odd.
    step = (near_size < size).astype(np.uint32) - (near_size > size).astype(np.uint32)  # -1 wraps, and adds as -1
    bits += step * (~bits & np.uint32(1))
    return near


def widened(stored: Array, form: str) -> Array:
    """Stored numbers in float64, exactly."""
    values = from_bfloat16(stored) if form == "bfloat16" else stored
    with np.errstate(invalid="ignore"):  # a NaN stays one, signalling or not
        wide: Array = values.astype(np.float64)
    return wide


def is_finite(stored: Array, form: str) -> Array:
    """Which stored numbers are finite."""
    exponent = np.uint16(0x7F80)  # all ones in an infinity or a NaN
    finite: Array = (stored & exponent) != exponent if form == "bfloat16" else np.isfinite(stored)
    return finite


def format_of(operand: Operand) -> str:
    """Name of the format that a weight is kept in."""
    if isinstance(operand, Adapted):
        return format_of(operand.base)
    return "bfloat16" if isinstance(operand, Bfloat16Matrix) else str(operand.dtype)


def largest(form: str) -> float:
    """Largest finite number of a format."""
    return float(from_bfloat16(np.array(0x7F7F, np.uint16)) if form == "bfloat16" else np.finfo(form).max)
