"""Put an adapter on a model without touching the model: a tree of parameters that shares every array of the base.

A changed matrix becomes an `Adapted` operand, the base and its low-rank deltas side by side; what the deltas mean is
written in `refgemma.ops.linear`. Taking an adapter off is going back to the tree of before.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from refgemma.compute.threads import mapped
from refgemma.errors import InputError
from refgemma.lora.fit import Change, LowRank, Replaced, ReplacedRows
from refgemma.lora.materialise import Plain, wide_rows
from refgemma.lora.paths import at, branched, put
from refgemma.lora.pieces import pieces
from refgemma.lora.rounding import rounded, widened
from refgemma.model import Params
from refgemma.numerics import Array, Bfloat16Matrix, to_host
from refgemma.ops.linear import Adapted, Delta, Operand


def attach(
    params: Params,
    changes: list[Change],
    *,
    before: Params | None = None,
    scale: float = 1.0,
    rows: Array | None = None,
    dtype: DTypeLike | None = np.float32,
) -> Params:
    """Parameters of a model with the changes of an adapter.

    Parameters
    ----------
    params : Params
        The model, perhaps with adapters on it already: their changes are summed, each against the base.
    changes : list of LowRank, Replaced or ReplacedRows
        All of one adapter, from `refgemma.lora.fit.fit`.
    before : Params, optional
        The model without any adapter, if `params` has some.
    scale : float
        Multiplies the low-rank products, as PEFT's ``set_scale`` does; DoRA's magnitudes stay.
    rows : ndarray of bool, shape (B,), optional
        The rows of the batch that get the changes; all, if not given.
    dtype : dtype or None
        Of the activations that the factors will meet, float32 or float64; None leaves factors as they were read.

    Returns
    -------
    Params
        New tree, old arrays. What comes from the adapter is in NumPy arrays, wherever the model is.

    Raises
    ------
    ValueError
        If a weight that was trained whole is to be scaled, to be there for some rows only, or meets another adapter, or
        the scale is no finite number.
    """
    scale = checked_scale(scale)
    original = params if before is None else before
    tree = branched(params)
    for change in changes:
        base, untouched, now = at(params, change.path), at(original, change.path), at(tree, change.path)
        if isinstance(change, Replaced):
            put(tree, change.path, _replacement(now, untouched, change, scale, rows, dtype))
        elif base is not untouched and not isinstance(base, Adapted):
            raise InputError(_together(change.path))
        else:
            put(tree, change.path, _adapted(now, change, scale, rows, dtype))
    return tree


def checked_scale(scale: Any) -> float:
    """Weight of an adapter's changes, once it is seen to be one.

    Parameters
    ----------
    scale : Any
        What was given.

    Returns
    -------
    float
        The same number.

    Raises
    ------
    ValueError
        If it is no finite number.
    """
    try:
        number = float(scale) if isinstance(scale, numbers.Real) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"scale is {scale!r:.40}: expected a finite number")
    return number


def narrowed(changes: list[Change], params: Params, rows: Array | None = None) -> list[Change]:
    """Changes as an engine that computes in bfloat16 loads them.

    Parameters
    ----------
    changes : list of LowRank, Replaced or ReplacedRows
        Of one adapter.
    params : Params
        The model that they are for.
    rows : ndarray of bool, shape (B,), optional
        The rows of the batch that get them.

    Returns
    -------
    list of LowRank, Replaced or ReplacedRows
        What was trained whole is rounded to the format of the base, and rows of a table become a table with these
        rows, so that no rounded product is put right by another. Low-rank factors stay.

    Notes
    -----
    For some rows of a batch only, or on top of another adapter, there is no such table. New rows are then a change of
    the old ones, and what comes out is off by a rounding of what the old ones give.

    References
    ----------
    PEFT 0.21: ``cast_adapter_dtype`` widens factors and no other weights, ``TrainableTokensLayer.get_merged_weights``
    narrows rows.
    """
    return [_narrowed(change, at(params, change.path), rows) for change in changes]


def _narrowed(change: Change, base: Operand, rows: Array | None) -> Change:
    if isinstance(change, Replaced):
        if isinstance(change.weight, Bfloat16Matrix):
            return change
        bits = rounded(change.weight.astype(np.float64), "bfloat16")
        narrow = Bfloat16Matrix(bits) if bits.ndim == 2 else widened(bits, "bfloat16").astype(np.float32)
        return Replaced(change.path, narrow)
    if isinstance(change, LowRank):
        return change
    new = rounded(change.rows.astype(np.float64), "bfloat16")
    if rows is not None or isinstance(base, Adapted):
        return replace(change, rows=widened(new, "bfloat16"))
    if isinstance(base, Bfloat16Matrix):
        bits = to_host(base.bits).copy()
    else:
        bits = rounded(to_host(base).astype(np.float64), "bfloat16")
    bits[list(change.ids)] = new
    return Replaced(change.path, Bfloat16Matrix(bits))


def _replacement(
    now: Operand, untouched: Operand, change: Replaced, scale: float, rows: Array | None, dtype: DTypeLike | None
) -> Any:
    new, base = change.weight, untouched.base if isinstance(untouched, Adapted) else untouched
    if not isinstance(base, Bfloat16Matrix) and base.ndim == 1:
        new = new.astype(base.dtype, copy=False)
    if _equal(base, new):
        return now  # PEFT stores a table beside its factors even where it never changed
    if now is not base:
        raise InputError(_together(change.path))
    if scale != 1:
        raise InputError(_unscalable(change.path, scale))
    if rows is not None:
        raise InputError(
            f"the adapter is for some rows of the batch, but it holds {change.path} trained whole: use it for all"
        )
    widest = np.dtype(dtype or np.float64) if isinstance(base, Bfloat16Matrix) else base.dtype
    if isinstance(new, np.ndarray) and new.dtype.itemsize > widest.itemsize:
        new = new.astype(widest)
    return new


def _adapted(
    base: Operand, change: LowRank | ReplacedRows, scale: float, rows: Array | None, dtype: DTypeLike | None
) -> Adapted:
    weight, deltas = (base.base, base.deltas) if isinstance(base, Adapted) else (base, ())
    table = change.path == "embed"
    if isinstance(change, LowRank):
        scaled = change.scale * scale
        down, up, bias = change.down, change.up, change.bias
        gain = None if change.magnitude is None else change.magnitude / _norms(weight, down, up, scaled, columns=table)
        kept = np.result_type(down, up) if dtype is None else np.dtype(dtype)
        if abs(scaled) > float(np.finfo(kept).max):
            raise InputError(f"the change of {change.path} is scaled by {scaled:g}: no number of {kept} is as large")
    else:
        if scale != 1:
            raise InputError(_unscalable(change.path, scale))
        # To replace some rows is to add a product of low rank: which rows, times how they differ.
        scaled, bias, gain = 1.0, None, None
        kept = np.dtype(np.float64 if dtype is None else dtype)
        ids = np.array(change.ids, dtype=np.int64)
        up = np.zeros((weight.shape[0], len(ids)), np.uint8 if dtype is None else kept)
        up[ids, np.arange(len(ids))] = 1
        old = weight.rows(ids, np.dtype(np.float64)) if isinstance(weight, Bfloat16Matrix) else weight[ids]
        down = change.rows - to_host(old).astype(np.float64, copy=False)
    if up.dtype != np.uint8:  # ones and zeros that no activation will meet
        up = np.asarray(up, kept)
    down = np.asarray(down, kept)
    delta = Delta(
        a=up.T if table else down,
        b=down.T if table else up,
        scale=scaled,
        rows=rows,
        gain=gain,
        bias=None if bias is None else np.asarray(bias, kept),
    )
    return Adapted(weight, (*deltas, delta))


def _together(path: str) -> str:
    return f"{path} was trained whole, and another adapter changes it: use one of the two"


def _unscalable(path: str, scale: float) -> str:
    return f"the adapter is to be scaled by {scale:g}, but it holds {path} trained whole: use scale 1"


def _norms(weight: Plain, down: Array, up: Array, scale: float, *, columns: bool) -> Array:
    """Norm of each row, or each column, of ``weight + scale * up @ down``; float64, by tiles of rows."""
    down = down.astype(np.float64)

    def squares(tile: slice) -> Array:
        changed = wide_rows(weight, tile) + scale * (up[tile].astype(np.float64) @ down)
        total: Array = np.square(changed).sum(axis=0 if columns else 1)
        return total

    sums = list(mapped(squares, pieces(weight.shape, slice(0, weight.shape[0]))))
    norms: Array = np.sqrt(np.sum(sums, axis=0) if columns else np.concatenate(sums))
    return norms


def _equal(base: Plain, new: Plain) -> bool:
    """Whether two weights hold the same numbers, in whatever formats."""
    return all(
        np.array_equal(wide_rows(base, tile), wide_rows(new, tile))
        for tile in pieces(base.shape, slice(0, base.shape[0]))
    )
