"""Attach adapters to a model: a new tree of parameters that shares every array of the base.

A changed matrix becomes an `Adapted` operand, which holds the base and its low-rank deltas (`refgemma.ops.linear`). The
old tree is the model without the adapter.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from refgemma.compute.threads import mapped
from refgemma.errors import InputError
from refgemma.lora.fit import Change, LowRank, Replaced, ReplacedRows
from refgemma.lora.tiles import Plain, rounded, tiles, wide_rows, widened
from refgemma.numerics import Array, Bfloat16Matrix, namespace_of, to_host
from refgemma.ops.linear import Adapted, Delta, Operand
from refgemma.params import Params, at, build, changed, leaves


def attach(
    params: Params,
    changes: list[Change],
    *,
    before: Params | None = None,
    scale: float = 1.0,
    rows: Array | None = None,
    dtype: DTypeLike | None = np.float32,
) -> Params:
    """Add the changes of an adapter to the parameters of a model: a new tree of the old arrays.

    `params` may have adapters attached; `before` is then the model without any. `scale` multiplies low-rank products
    as PEFT's ``set_scale`` does, and leaves DoRA's magnitudes. `rows` (B,), of bool, limits the changes to some rows of
    the batch. Factors are converted to `dtype`, that of the activations, or left as in the file (None); they stay NumPy
    arrays, whatever device the model is on.
    """
    scale = checked_scale(scale)
    original = params if before is None else before
    tree = dict(leaves(params))
    for change in changes:
        base, untouched, now = at(params, change.path), at(original, change.path), tree[change.path]
        if isinstance(change, Replaced):
            tree[change.path] = _replacement(now, untouched, change, scale, rows, dtype)
        elif base is not untouched and not isinstance(base, Adapted):
            raise InputError(_exclusive(change.path))
        else:
            tree[change.path] = _adapted(now, change, scale, rows, dtype)
    return build(tree)


def checked_scale(scale: Any) -> float:
    """The scale of an adapter, if it is a finite number."""
    try:
        number = float(scale) if isinstance(scale, numbers.Real) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"scale is {scale!r:.40}: expected a finite number")
    return number


def narrowed(changes: list[Change], params: Params, rows: Array | None = None) -> list[Change]:
    """Changes as an engine that computes in bfloat16 loads them.

    What was trained whole is rounded to bfloat16, and new rows of a table become a whole table, so that a row is
    rounded once and not as the sum of an old row and a difference. Low-rank factors stay. For some rows of a batch
    only, or on top of another adapter, there is no such table; results are then off by a rounding of the old rows.

    References
    ----------
    PEFT 0.21: ``cast_adapter_dtype`` widens factors and no other weights, ``TrainableTokensLayer.get_merged_weights``
    narrows rows.
    """
    return [_narrowed(change, at(params, change.path), rows) for change in changes]


def for_rows(base: Params, own: Sequence[Params]) -> Params:
    """Parameters for a batch in which each row has its own adapter, or none; `own` has the tree of each row."""
    trees = list({id(tree): tree for tree in own}.values())
    if len(trees) == 1:
        return trees[0]
    xp = namespace_of(base["final_norm"])
    rows = [xp.asarray([one is tree for one in own]) for tree in trees]
    return changed(base, lambda path, weight: _side_by_side(path, weight, [at(tree, path) for tree in trees], rows))


def _side_by_side(path: str, base: Any, trees: list[Any], rows: list[Array]) -> Any:
    """One operand for a batch in which each row has its own."""
    if all(tree is base for tree in trees):
        return base
    weight, common = (base.base, base.deltas) if isinstance(base, Adapted) else (base, ())
    deltas: list[Delta] = list(common)
    for adapted, mask in zip(trees, rows, strict=True):
        if adapted is base:
            continue
        if not isinstance(adapted, Adapted) or adapted.base is not weight:
            raise InputError(
                f"an adapter holds {path} trained whole: it cannot share a batch with rows that have another weight"
            )
        deltas += [replace(delta, rows=mask) for delta in adapted.deltas[len(common) :]]
    return Adapted(weight, tuple(deltas))


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
        return now  # PEFT stores a table beside its factors even if it did not change
    if now is not base:
        raise InputError(_exclusive(change.path))
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
        # New rows are a low-rank change: a selection of rows times the difference.
        scaled, bias, gain = 1.0, None, None
        kept = np.dtype(np.float64 if dtype is None else dtype)
        ids = np.array(change.ids, dtype=np.int64)
        up = np.zeros((weight.shape[0], len(ids)), np.uint8 if dtype is None else kept)
        up[ids, np.arange(len(ids))] = 1
        old = weight.rows(ids, np.dtype(np.float64)) if isinstance(weight, Bfloat16Matrix) else weight[ids]
        down = change.rows - to_host(old).astype(np.float64, copy=False)
    if up.dtype != np.uint8:  # a selection that is only merged
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


def _exclusive(path: str) -> str:
    return f"{path} was trained whole, and another adapter changes it: use one of the two"


def _unscalable(path: str, scale: float) -> str:
    return f"the adapter is to be scaled by {scale:g}, but it holds {path} trained whole: use scale 1"


def _norms(weight: Plain, down: Array, up: Array, scale: float, *, columns: bool) -> Array:
    """Norm of each row, or each column, of ``weight + scale * up @ down``, in float64."""
    down = down.astype(np.float64)

    def squares(tile: slice) -> Array:
        changed = wide_rows(weight, tile) + scale * (up[tile].astype(np.float64) @ down)
        total: Array = np.square(changed).sum(axis=0 if columns else 1)
        return total

    sums = list(mapped(squares, tiles(weight.shape)))
    norms: Array = np.sqrt(np.sum(sums, axis=0) if columns else np.concatenate(sums))
    return norms


def _equal(base: Plain, new: Plain) -> bool:
    """Whether two weights hold the same numbers, even in different formats."""
    return all(np.array_equal(wide_rows(base, tile), wide_rows(new, tile)) for tile in tiles(base.shape))
