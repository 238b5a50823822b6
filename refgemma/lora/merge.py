"""Write low-rank changes into the weights: in float64, by tiles of rows, rounded once at the end.

``W + sum_j (g_j (W + s_j B_j A_j) - W)``, where the gain g_j is DoRA's and otherwise 1. Merging, storing and auditing
an adapter all compute this matrix.

References
----------
Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1; Liu et al., "DoRA: Weight-Decomposed
Low-Rank Adaptation", 2024, eq. 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from refgemma.compute.threads import mapped
from refgemma.errors import InputError
from refgemma.lora.tiles import FORMATS, Plain, format_of, is_finite, largest, rounded, tiles, wide_rows
from refgemma.numerics import Array, Bfloat16Matrix, to_host
from refgemma.ops.linear import Adapted, Delta, Operand
from refgemma.params import Params, at, changed


def merge(params: Params, before: Params) -> Params:
    """Replace adapted weights by plain ones, in the formats of `before`, the model without adapters.

    A head that was the embedding itself stays so if both come out the same.
    """

    def merged(path: str, new: Any) -> Any:
        old = at(before, path)
        with naming(path):
            return new if new is old else materialise(new, format_of(old), table=path == "embed")

    tree = changed(params, merged)
    tied, moved = before["head"] is before["embed"], tree["embed"] is not before["embed"]
    if tied and moved and tree["head"] is not before["head"] and _same(tree["embed"], tree["head"]):
        tree["head"] = tree["embed"]
    return tree


def _same(a: Any, b: Any) -> bool:
    a, b = (to_host(w.bits if isinstance(w, Bfloat16Matrix) else w) for w in (a, b))
    return np.array_equal(a, b)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Begin errors with the path of the weight."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def materialise(operand: Operand, form: str | None = None, *, table: bool = False) -> Plain:
    """Plain matrix of a weight, in its own or another format; `table` says that it is the embedding."""
    form = form or format_of(operand)
    if form not in FORMATS:
        raise InputError(f"dtype is {form!r}: expected {', '.join(FORMATS)}")
    if not isinstance(operand, Adapted) and format_of(operand) == form:
        return operand
    numbers = stored_rows(operand, slice(0, operand.shape[0]), form, table=table)
    numbers.flags.writeable = False
    return Bfloat16Matrix(numbers) if form == "bfloat16" else numbers


def stored_rows(operand: Operand, rows: slice, form: str, *, table: bool = False) -> Array:
    """Rows of that matrix, as a file stores them."""
    weight, terms = split(operand, table=table)
    out = np.empty((rows.stop - rows.start, *operand.shape[1:]), "uint16" if form == "bfloat16" else form)

    def merge_tile(tile: slice) -> None:
        base = wide_rows(weight, tile)
        wide = base + change(terms, base, tile) if terms else base
        narrow = rounded(wide, form)
        check_finite(narrow, wide, base, form, tile)
        out[tile.start - rows.start : tile.stop - rows.start] = narrow

    for _ in mapped(merge_tile, tiles(operand.shape, rows)):
        pass
    return out


class Term(NamedTuple):
    """One delta of a weight, as ``gain * (W + scale * up @ down) - W``."""

    up: Array  # (O, R), in the factor's own dtype
    down: Array  # (R, I), float64
    scale: float
    gain: Array | None  # (O, 1), or (1, I) for the embedding; float64


def split(operand: Operand, *, table: bool = False) -> tuple[Plain, tuple[Term, ...]]:
    """Weight and deltas of an operand; those of a table are transposed."""
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
    """What deltas add to some rows of a weight."""
    total = np.zeros_like(base)  # rows I
    with np.errstate(over="ignore", invalid="ignore"):  # `check_finite` reports it
        for term in terms:
            up = np.ascontiguousarray(term.up[rows], np.float64)
            own = _product(up, term.down)
            own *= term.scale
            if term.gain is not None:
                own = (base + own) * (term.gain if len(term.gain) == 1 else term.gain[rows]) - base
            total += own
    return total


def _product(up: Array, down: Array) -> Array:
    """``up @ down``; where each row of `up` holds at most one number, as for new rows of a table, by picking rows."""
    filled = up != 0
    if filled.sum(axis=1).max(initial=0) > 1:
        # Not by BLAS, whose order of summing would depend on how the rows are cut.
        dense: Array = np.einsum("or,ri->oi", up, down)
        return dense
    sparse = np.zeros((len(up), down.shape[1]))
    hit, column = np.nonzero(filled)
    sparse[hit] = up[hit, column][:, None] * down[column]
    return sparse


def check_finite(narrow: Array, wide: Array, base: Array, form: str, rows: slice) -> None:
    """Refuse merged numbers that are not finite where those of the base are."""
    finite = is_finite(narrow, form)
    if finite.all():
        return
    bad = np.argwhere(~finite & np.isfinite(base))
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
