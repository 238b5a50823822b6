"""Matrix products with a weight, ``y = x W^T``, for the kinds of operand a weight can be.

An array is multiplied as it is. A `Bfloat16Matrix` is widened tile by tile while it is multiplied, so that it never
stands in memory whole (`refgemma.ops.tiles`). An `Adapted` operand is one of these plus low-rank deltas,
``x W^T + scale (x A^T) B^T``.

Weights keep the checkpoint's (out, in) order: a row holds the weights of one output.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from refgemma.numerics import FLOAT32, Array, Bfloat16Matrix, Numerics
from refgemma.ops.tiles import check_narrow, widened_product


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """A low-rank change of one weight, ``scale * B A``, and the batch rows it applies to.

    Attributes
    ----------
    a : ndarray, shape (R, I)
        First factor, from the input down to the rank.
    b : ndarray, shape (O, R)
        Second factor, from the rank up to the output.
    scale : float
        Multiplies the product; the alpha / R of the LoRA paper.
    rows : ndarray of bool, shape (B,), or None
        Which rows of the batch it applies to; None means all.
    gain : ndarray of float64, shape (O,), or None
        DoRA's factor for each output, magnitude over the norm of the changed row; None means 1.
    bias : ndarray, shape (O,), or None
        Added to every output, `scale` times: the bias that PEFT can give the second factor.
    """

    a: Array
    b: Array
    scale: float
    rows: Array | None = None
    gain: Array | None = None
    bias: Array | None = None


@dataclass(frozen=True, eq=False)
class Adapted:
    """A weight with low-rank deltas; the weight itself is left untouched.

    Attributes
    ----------
    base : ndarray or Bfloat16Matrix, shape (O, I)
        The weight.
    deltas : tuple of Delta
        Applied side by side: each is computed against the base, and their changes are summed.
    """

    base: Array | Bfloat16Matrix
    deltas: tuple[Delta, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base."""
        return self.base.shape


Operand: TypeAlias = Array | Bfloat16Matrix | Adapted


def linear(x: Array, w: Operand, *, numerics: Numerics = FLOAT32) -> Array:
    """Product of activations with a weight, ``x W^T``.

    Parameters
    ----------
    x : ndarray, shape (B, ..., I)
        Activations, float32 or float64.
    w : Operand, shape (O, I)
        The weight, in the dtype of `x` or a narrower one.
    numerics : Numerics
        Where values are rounded.

    Returns
    -------
    ndarray, shape (B, ..., O)
        In the dtype of `x`.

    Raises
    ------
    ValueError
        If the widths disagree, or the weight is wider than the activations.

    References
    ----------
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, eq. 3; Liu et al., "DoRA: Weight-Decomposed
    Low-Rank Adaptation", 2024, eq. 5.
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} channels, the weight has shape {w.shape}: expected (out, {x.shape[-1]})")
    if isinstance(w, Adapted):
        y = linear(x, w.base, numerics=numerics)
        low_rank = functools.partial(linear, numerics=numerics)
        return _with_deltas(y, w.deltas, lambda delta, rows: low_rank(low_rank(x[rows], delta.a), delta.b))
    flat = x.reshape(-1, x.shape[-1])
    if not isinstance(w, Bfloat16Matrix) and w.dtype == x.dtype:
        y = flat @ w.T
    else:
        y = widened_product(flat, w)
    return numerics.round("linear", y.reshape(*x.shape[:-1], w.shape[0]))


def table_rows(tokens: Array, table: Operand, numerics: Numerics = FLOAT32) -> Array:
    """Rows of an embedding table, in the dtype of activations.

    Parameters
    ----------
    tokens : ndarray of int, shape (B, T)
        Token ids in ``[0, V)``.
    table : Operand, shape (V, D)
        The table. Deltas of an `Adapted` one hold `a` as (R, V) and `b` as (D, R).
    numerics : Numerics
        Dtype of the result; where values are rounded.

    Returns
    -------
    ndarray, shape (B, T, D)
        A copy.

    Raises
    ------
    ValueError
        If the table is wider than the activations.
    """
    if isinstance(table, Adapted):
        y = table_rows(tokens, table.base, numerics)

        def product(delta: Delta, rows: Any) -> Array:
            return linear(table_rows(tokens[rows], delta.a.T, numerics), delta.b, numerics=numerics)

        return _with_deltas(y, table.deltas, product)
    if isinstance(table, Bfloat16Matrix):
        return table.rows(tokens, numerics.dtype)
    check_narrow(table, numerics.dtype)
    rows: Array = table[tokens].astype(numerics.dtype, copy=False)
    return rows


def _with_deltas(y: Array, deltas: Iterable[Delta], product: Any) -> Array:
    """`y` of the base plus what each delta changes; ``product(delta, rows)`` is the delta's unscaled output."""
    total = y.copy()
    for delta in deltas:
        rows = slice(None) if delta.rows is None else delta.rows
        if delta.rows is not None and len(delta.rows) != len(y):
            raise ValueError(f"an adapter is for rows of a batch of {len(delta.rows)}, the batch has {len(y)}")
        change = product(delta, rows)
        if delta.bias is not None:
            change = change + delta.bias
        change *= delta.scale
        if delta.gain is not None:
            change = (y[rows] + change) * delta.gain.astype(y.dtype) - y[rows]
        total[rows] += change
    return total
