"""Put an adapter on a model without touching the model: a tree of parameters that shares every array of the base.

A changed matrix becomes an `Adapted` operand, the base and its low-rank deltas side by side; what the deltas mean is
written in `refgemma.ops.linear`. Taking an adapter off is going back to the tree of before.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike

from refgemma.lora.fit import Change, LowRank, Replaced, ReplacedRows
from refgemma.lora.materialise import Plain, wide_rows
from refgemma.lora.pieces import pieces, side_by_side
from refgemma.model import Params
from refgemma.numerics import Array, Bfloat16Matrix
from refgemma.ops.linear import Adapted, Delta, Operand


def attach(
    params: Params,
    changes: list[Change],
    *,
    scale: float = 1.0,
    rows: Array | None = None,
    dtype: DTypeLike = np.float32,
) -> Params:
    """Parameters of a model with the changes of an adapter.

    Parameters
    ----------
    params : Params
        The model, perhaps with adapters on it already: their changes are summed, each against the base.
    changes : list of LowRank, Replaced or ReplacedRows
        From `refgemma.lora.fit.fit`.
    scale : float
        Multiplies the low-rank products, as PEFT's ``set_scale`` does; DoRA's magnitudes stay.
    rows : ndarray of bool, shape (B,), optional
        The rows of the batch that get the changes; all, if not given.
    dtype : dtype
        Of the activations that the factors will meet, float32 or float64.

    Returns
    -------
    Params
        New tree, old arrays.

    Raises
    ------
    ValueError
        If a weight that was trained whole is to be scaled, to be there for some rows only, or meets another adapter.
    """
    tree: dict[str, Any] = {
        **params,
        "layers": [{"attn": {**layer["attn"]}, "mlp": {**layer["mlp"]}} for layer in params["layers"]],
    }
    for change in changes:
        *parents, last = change.path.split(".")
        node: Any = tree
        for part in parents:
            node = node[int(part) if part.isdigit() else part]
        if isinstance(change, Replaced):
            node[last] = _replacement(node[last], change, scale, rows, dtype)
        else:
            node[last] = _adapted(node[last], change, scale, rows, dtype)
    return cast(Params, tree)


def _replacement(base: Operand, change: Replaced, scale: float, rows: Array | None, dtype: DTypeLike) -> Any:
    new = change.weight
    if isinstance(base, np.ndarray) and base.ndim == 1:
        new = new.astype(base.dtype, copy=False)
    if _equal(base.base if isinstance(base, Adapted) else base, new):
        return base  # PEFT stores a table beside its factors even where it never changed
    if isinstance(base, Adapted):
        raise ValueError(f"{change.path} was trained whole, and another adapter changes it: use one of the two")
    _refuse_scale(change.path, scale)
    if rows is not None:
        raise ValueError(
            f"the adapter is for some rows of the batch, but it holds {change.path} trained whole: use it for all"
        )
    widest = base.dtype if isinstance(base, np.ndarray) else np.dtype(dtype)
    if isinstance(new, np.ndarray) and new.dtype.itemsize > widest.itemsize:
        new = new.astype(widest)
    return new


def _adapted(
    base: Operand, change: LowRank | ReplacedRows, scale: float, rows: Array | None, dtype: DTypeLike
) -> Adapted:
    weight, deltas = (base.base, base.deltas) if isinstance(base, Adapted) else (base, ())
    table = change.path == "embed"
    if isinstance(change, LowRank):
        scaled = change.scale * scale
        down, up, bias = change.down, change.up, change.bias
        gain = None if change.magnitude is None else change.magnitude / _norms(weight, down, up, scaled, columns=table)
    else:
        _refuse_scale(change.path, scale)
        # To replace some rows is to add a product of low rank: which rows, times how they differ.
        scaled, bias, gain = 1.0, None, None
        ids = np.array(change.ids, dtype=np.int64)
        up = np.zeros((weight.shape[0], len(ids)), dtype)
        up[ids, np.arange(len(ids))] = 1
        old = weight.rows(ids, np.dtype(np.float64)) if isinstance(weight, Bfloat16Matrix) else weight[ids]
        down = change.rows - old.astype(np.float64, copy=False)
    a, b = (up.T, down.T) if table else (down, up)
    delta = Delta(
        a=np.asarray(a, dtype),
        b=np.asarray(b, dtype),
        scale=scaled,
        rows=rows,
        gain=gain,
        bias=None if bias is None else np.asarray(bias, dtype),
    )
    return Adapted(weight, (*deltas, delta))


def _refuse_scale(path: str, scale: float) -> None:
    if scale != 1:
        raise ValueError(f"the adapter is to be scaled by {scale:g}, but it holds {path} trained whole: use scale 1")


def _norms(weight: Plain, down: Array, up: Array, scale: float, *, columns: bool) -> Array:
    """Norm of each row, or each column, of ``weight + scale * up @ down``; float64, by tiles of rows."""
    down = down.astype(np.float64)

    def squares(tile: slice) -> Array:
        changed = wide_rows(weight, tile) + scale * (up[tile].astype(np.float64) @ down)
        total: Array = np.square(changed).sum(axis=0 if columns else 1)
        return total

    sums = list(side_by_side(squares, pieces(weight.shape, slice(0, weight.shape[0]))))
    norms: Array = np.sqrt(np.sum(sums, axis=0) if columns else np.concatenate(sums))
    return norms


def _equal(base: Plain, new: Plain) -> bool:
    """Whether two weights hold the same numbers, in whatever formats."""
    return all(
        np.array_equal(wide_rows(base, tile), wide_rows(new, tile))
        for tile in pieces(base.shape, slice(0, base.shape[0]))
    )
