"""Matrix products with a weight, ``y = x W^T``, for the kinds of operand a weight can be.

An array is multiplied as it is. A `Bfloat16Matrix` is widened tile by tile while it is multiplied, so that it is never
in memory whole (`refgemma.compute.products`). An `Adapted` operand is one of these plus low-rank deltas,
``x W^T + scale (x A^T) B^T``.

Weights keep the checkpoint's (out, in) order: a row holds the weights of one output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from refgemma.compute.products import check_narrow, times_transposed
from refgemma.errors import InputError
from refgemma.numerics import FLOAT32, Array, Bfloat16Matrix, Numerics


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

    Notes
    -----
    Beside a narrow base PEFT keeps factors in float32 and widens the activations to match (``autocast_adapter_dtype``),
    so where `numerics` rounds, it rounds the base's product and the sum, but not the low-rank products.

    References
    ----------
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, eq. 3; Liu et al., "DoRA: Weight-Decomposed
    Low-Rank Adaptation", 2024, eq. 5.
    """
    return linears(x, (w,), numerics=numerics)[0]


def linears(
    x: Array, weights: Sequence[Operand], *, columns: bool = False, numerics: Numerics = FLOAT32
) -> list[Array]:
    """Multiply the same activations with several weights, which is faster than one after the other.

    Parameters
    ----------
    x : ndarray, shape (B, ..., I)
        Activations, float32 or float64.
    weights : sequence of Operand, shape (O, I)
        As for `linear`; O may differ.
    columns : bool
        Whether a channel of all tokens may be contiguous in memory, instead of all channels of a token. It is faster
        for element-wise work, and slower for what is read token by token.
    numerics : Numerics
        Where values are rounded.

    Returns
    -------
    list of ndarray, shape (B, ..., O)
        In the dtype of `x`, one for each weight.

    Raises
    ------
    ValueError
        If the widths disagree, or a weight is wider than the activations.
    """
    *axes, I = x.shape
    for w in weights:
        if w.shape[-1] != I:
            raise InputError(f"x has {I} channels, the weight has shape {w.shape}: expected (out, {I})")
    bases = [w.base if isinstance(w, Adapted) else w for w in weights]
    products = []
    for w, y in zip(weights, times_transposed(x.reshape(-1, I), bases, columns=columns), strict=True):  # y = x W^T
        y = numerics.round("linear", y.reshape(*axes, w.shape[0]))
        if isinstance(w, Adapted):
            y = with_deltas(y, w.deltas, lambda delta, rows: linear(linear(x[rows], delta.a), delta.b))
            y = numerics.round("linear", y)
        products.append(y)
    return products


def table_rows(tokens: Array, table: Operand, numerics: Numerics = FLOAT32) -> Array:
    """Look up rows of an embedding table, in the dtype of activations.

    Parameters
    ----------
    tokens : ndarray of int, shape (B, T)
        Token ids in ``[0, V)``.
    table : Operand, shape (V, D)
        The table. Deltas of an `Adapted` one hold `a` as (R, V) and `b` as (D, R).
    numerics : Numerics
        Dtype of the result.

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
        return with_deltas(y, table.deltas, lambda delta, rows: low_rank_rows(tokens[rows], delta, numerics))
    if isinstance(table, Bfloat16Matrix):
        return table.rows(tokens, numerics.dtype)
    rows: Array = table[tokens]
    if rows.dtype != numerics.dtype:
        check_narrow(table, numerics.dtype)
        rows = rows.astype(numerics.dtype)
    return rows


def low_rank_rows(tokens: Array, delta: Delta, numerics: Numerics = FLOAT32) -> Array:
    """Compute rows of a table's low-rank delta, unscaled.

    Parameters
    ----------
    tokens : ndarray of int, shape (B, T)
        Token ids in ``[0, V)``.
    delta : Delta
        With `a` as (R, V) and `b` as (D, R).
    numerics : Numerics
        Dtype of the result; nothing is rounded.

    Returns
    -------
    ndarray, shape (B, T, D)
        New.
    """
    return linear(table_rows(tokens, delta.a.T, numerics), delta.b)


def with_deltas(y: Array, deltas: tuple[Delta, ...], product: Callable[[Delta, Any], Array]) -> Array:
    """Output of the base plus the change that each delta makes.

    Parameters
    ----------
    y : ndarray, shape (B, ..., O)
        Outputs of the base; may be overwritten.
    deltas : tuple of Delta
        Each is computed against `y` as it came in.
    product : callable
        ``product(delta, rows)`` is the unscaled low-rank output for some rows of the batch, in a new array.

    Returns
    -------
    ndarray, shape (B, ..., O)
        The sum.

    Raises
    ------
    ValueError
        If a delta is for rows of another batch.
    """
    total = y.copy() if any(delta.gain is not None for delta in deltas[1:]) else y  # a gain needs the base's own output
    for delta in deltas:
        rows = slice(None) if delta.rows is None else delta.rows
        if delta.rows is not None and len(delta.rows) != len(y):
            raise InputError(f"an adapter is for rows of a batch of {len(delta.rows)}, the batch has {len(y)}")
        change = product(delta, rows)
        if delta.bias is not None:
            change += delta.bias
        change *= delta.scale
        if delta.gain is not None:
            change *= delta.gain.astype(y.dtype)
            change += (delta.gain - 1).astype(y.dtype) * y[rows]
        total[rows] += change
    return total
