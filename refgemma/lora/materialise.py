"""Write a weight with adapters on it out as a plain matrix: in float64, by tiles of rows, rounded once at the end.

``W + sum_j (g_j (W + s_j B_j A_j) - W)``, where the gain g_j is DoRA's and otherwise 1. Merging, storing and auditing
an adapter all mean this matrix, whoever made the operand.

References
----------
Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1; Liu et al., "DoRA: Weight-Decomposed
Low-Rank Adaptation", 2024, eq. 5.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import numpy as np

from refgemma.compute.threads import mapped
from refgemma.errors import InputError
from refgemma.lora.pieces import pieces
from refgemma.lora.rounding import FORMATS, format_of, largest, rounded
from refgemma.numerics import Array, Bfloat16Matrix, to_host
from refgemma.ops.linear import Adapted, Delta, Operand

Plain: TypeAlias = Array | Bfloat16Matrix


def materialise(operand: Operand, dtype: str | None = None, *, table: bool = False) -> Plain:
    """Plain matrix of a weight, its low-rank deltas written into it."""
    form = dtype or format_of(operand)
    if form not in FORMATS:
        raise InputError(f"dtype is {form!r}: expected {', '.join(FORMATS)}")
    if not isinstance(operand, Adapted) and format_of(operand) == form:
        return operand
    numbers = stored_rows(operand, slice(0, operand.shape[0]), form, table=table)
    numbers.flags.writeable = False
    return Bfloat16Matrix(numbers) if form == "bfloat16" else numbers


class Term(NamedTuple):
    """One delta of a weight, the right way round: ``gain * (W + scale * up @ down) - W``."""

    up: Array  # (O, R), as it is; widened by the rows
    down: Array  # (R, I), float64
    scale: float
    gain: Array | None  # (O, 1), or (1, I) for the embedding; float64


def stored_rows(operand: Operand, rows: slice, form: str, *, table: bool = False) -> Array:
    """Some rows of that matrix, as a file stores them."""
    weight, terms = taken_apart(operand, table=table)
    out = np.empty((rows.stop - rows.start, *operand.shape[1:]), "uint16" if form == "bfloat16" else form)

    def one(tile: slice) -> None:
        base = wide_rows(weight, tile)
        wide = base + change(terms, base, tile) if terms else base
        narrow = rounded(wide, form)
        check_finite(narrow, wide, base, form, tile)
        out[tile.start - rows.start : tile.stop - rows.start] = narrow

    for _ in mapped(one, pieces(operand.shape, rows)):
        pass
    return out


def taken_apart(operand: Operand, *, table: bool = False) -> tuple[Plain, tuple[Term, ...]]:
    """Weight and deltas of an operand."""
    if not isinstance(operand, Adapted):
        return operand, ()
    return operand.base, tuple(_term(delta, table) for delta in operand.deltas)


def _term(delta: Delta, table: bool) -> Term:
    if delta.bias is not None:
        raise InputError(
            "the adapter adds a bias to the output, and no weight of Gemma has a place for one: attach it, do not merge"
        )
    if delta.rows is not None:
        raise InputError(
            "the adapter is for some rows of a batch only, and all rows share the weight: attach it, do not merge"
        )
    a, b = to_host(delta.a), to_host(delta.b)
    up, down = (a.T, b.T) if table else (b, a)
    gain = None if delta.gain is None else to_host(delta.gain).astype(np.float64)
    if gain is not None:
        gain = gain[None, :] if table else gain[:, None]
    return Term(up, np.ascontiguousarray(down, np.float64), delta.scale, gain)


def change(terms: Iterable[Term], base: Array, rows: slice) -> Array:
    """What deltas add to some rows of a weight. base (rows, I)."""
    total = np.zeros_like(base)
    with np.errstate(over="ignore", invalid="ignore"):  # who writes the sum down sees what is not finite
        for term in terms:
            up = np.ascontiguousarray(term.up[rows], np.float64)
            own = _product(up, term.down)
            own *= term.scale
            if term.gain is not None:
                own = (base + own) * (term.gain if len(term.gain) == 1 else term.gain[rows]) - base
            total += own
    return total


def _product(up: Array, down: Array) -> Array:
    """``up @ down``; where rows of `up` hold one number or none, as new rows of a table have it, each is picked out."""
    filled = up != 0
    if filled.sum(axis=1).max(initial=0) > 1:
        # No BLAS: its own threads would fight with ours, and how it sums would depend on how the rows are cut.
        dense: Array = np.einsum("or,ri->oi", up, down)
        return dense
    sparse = np.zeros((len(up), down.shape[1]))
    hit, column = np.nonzero(filled)
    sparse[hit] = up[hit, column][:, None] * down[column]
    return sparse


def wide_rows(weight: Plain, rows: slice) -> Array:
    """Some rows of a plain weight in float64. weight (O, I)."""
    with np.errstate(invalid="ignore"):  # a NaN stays one, signalling or not
        if isinstance(weight, Bfloat16Matrix):
            return to_host(weight.rows(rows, np.dtype(np.float64)))
        return to_host(weight[rows]).astype(np.float64)


def check_finite(narrow: Array, wide: Array, base: Array, form: str, rows: slice) -> None:
    """Refuse numbers that were finite in the base and are not any more.

    narrow (rows, I), wide (rows, I), base (rows, I).
    """
    exponent = np.uint16(0x7F80)
    lost = (narrow & exponent) == exponent if form == "bfloat16" else ~np.isfinite(narrow)
    if not lost.any():
        return
    bad = np.argwhere(lost & np.isfinite(base))
    if not len(bad):
        return
    row, *column = (int(i) for i in bad[0])
    value = float(wide[tuple(bad[0])])
    where = f"row {rows.start + row}" + (f", column {column[0]}" if column else "")
    if np.isfinite(value):
        raise InputError(
            f"{where} becomes {value:g}, too large for {form}, which ends at {largest(form):g}: use a wider format"
        )
    raise InputError(f"{where} becomes {value}, expected a finite number: the adapter or its scale is too large")
