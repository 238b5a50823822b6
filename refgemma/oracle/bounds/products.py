"""Rounding bounds of the matrix products: with a weight, of queries with keys, of probabilities with values.

Each is a sum of products in an order that is the engine's own; `refgemma.oracle.bounds.sums` says how far its roundings
reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refgemma.numerics import Array, Bfloat16Matrix
from refgemma.ops.attention import attention_mix, attention_scores
from refgemma.ops.linear import Adapted, Operand
from refgemma.oracle.bounds.arithmetic import Arithmetic
from refgemma.oracle.bounds.slack import Bound, Known, Size, bound
from refgemma.oracle.bounds.sums import chance_of_sum, compound, gamma, swallowed_by_one

_TILE = 2**22  # numbers of a weight that are widened at a time


def product(y: Array, x: Known, w: Operand, a: Arithmetic) -> Bound:
    """Bound of a matrix product with a weight, y (B, T, O)."""
    size = np.abs(x.value)
    ranks = [len(delta.a) + 4 for delta in w.deltas] if isinstance(w, Adapted) else []
    slacks = [] if x.exact else [np.broadcast_to(x.worst, size.shape)]
    variances = [] if x.exact else [np.broadcast_to(x.variance, size.shape)]
    biases = [np.abs(d.scale * d.bias) for d in w.deltas if d.bias is not None] if isinstance(w, Adapted) else []
    (magnitude, *worst), (squares, *variance) = against(w, [size, *slacks], [np.square(size), *variances])
    return _sum_bound(
        y,
        magnitude + sum(biases),
        squares + sum(map(np.square, biases)),
        x.value.shape[-1] + sum(ranks),
        a,
        roundings=("linear",),
        carried=(worst[0], variance[0]) if worst else (0.0, 0.0),
        each=3 * a.at("linear") * len(ranks),
    )


def scores(y: Array, q: Known, k: Known, scale: float, a: Arithmetic) -> Bound:
    """Bound of the attention scores, y (B, N, T, S)."""
    keys = k.map(lambda t: t.swapaxes(1, 2))

    def against_keys(left: Size, right: Size, factor: float) -> Array:
        return attention_scores(np.asarray(left), np.asarray(right), scale=factor)

    size, size_k = np.abs(q.value), np.abs(keys.value)
    magnitude = against_keys(size, size_k, scale)
    squares = against_keys(np.square(size), np.square(size_k), scale**2)
    carried: tuple[Size, Size] = (0.0, 0.0)
    if not (q.exact and k.exact):
        q_worst, q_variance = (np.broadcast_to(s, size.shape) for s in (q.worst, q.variance))
        k_worst, k_variance = (np.broadcast_to(s, size_k.shape) for s in (keys.worst, keys.variance))
        carried = (
            against_keys(q_worst, size_k + k_worst, scale) + against_keys(size, k_worst, scale),
            against_keys(q_variance, np.square(size_k) + k_variance, scale**2)
            + against_keys(np.square(size), k_variance, scale**2),
        )
    # Where queries are scaled and rounded first, each addend is off on its own.
    each = a.at("attn.query") + a.at("attn.scale")
    return _sum_bound(
        y,
        magnitude,
        squares,
        q.value.shape[-1] + 2,
        a,
        roundings=("attn.product", "attn.scores"),
        carried=carried,
        each=each,
    )


def mix(y: Array, probs: Known, v: Known, seen: Array, a: Arithmetic) -> Bound:
    """Bound of the values mixed by attention, y (B, T, N, H); seen (B, T): how many keys each query sees."""
    values = v.map(lambda t: t.swapaxes(1, 2))

    def mixed(left: Size, right: Size) -> Array:
        return attention_mix(np.asarray(left), np.asarray(right))

    size = np.abs(values.value)
    p = np.abs(probs.value)
    carried: tuple[Size, Size] = (0.0, 0.0)
    if not (probs.exact and v.exact):
        p_worst, p_variance = (np.broadcast_to(s, p.shape) for s in (probs.worst, probs.variance))
        v_worst, v_variance = (np.broadcast_to(s, size.shape) for s in (values.worst, values.variance))
        carried = (
            mixed(p_worst, size + v_worst) + mixed(p, v_worst),
            mixed(p_variance, np.square(size) + v_variance) + mixed(np.square(p), v_variance),
        )
    n = np.maximum(seen, 1)[:, :, None, None]
    return _sum_bound(
        y,
        mixed(p, size),
        mixed(np.square(p), np.square(size)),
        n,
        a,
        roundings=("attn.mix",),
        carried=carried,
    )


def against(w: Operand, linear: Sequence[Array], square: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """Products of nonnegative arrays (..., I) with the magnitudes and squares of a weight, by tiles: (..., O)."""
    O, I = w.shape
    outs: tuple[list[Array], list[Array]] = ([], [])
    for arrays, out in zip((linear, square), outs, strict=True):
        out.extend(np.empty((*array.shape[:-1], O)) for array in arrays)
    step = max(1, _TILE // I)
    for start in range(0, O, step):
        rows = slice(start, start + step)
        tile = _magnitudes(w, rows)
        for factor, arrays, out in zip((tile, np.square(tile)), (linear, square), outs, strict=True):
            for array, result in zip(arrays, out, strict=True):
                result[..., rows] = array @ factor.T
    return outs


def _magnitudes(w: Operand, rows: slice) -> Array:
    """Magnitudes of some rows of a weight, those of its deltas added."""
    if isinstance(w, Bfloat16Matrix):
        return np.abs(w.rows(rows, np.dtype(np.float64)))
    if not isinstance(w, Adapted):
        return np.abs(w[rows].astype(np.float64))
    total = _magnitudes(w.base, rows)
    for delta in w.deltas:
        b, a = np.abs(delta.b[rows].astype(np.float64)), np.abs(delta.a.astype(np.float64))
        total = total + abs(delta.scale) * (b @ a)
        if delta.gain is not None:
            total = total * np.maximum(1, np.abs(delta.gain[rows]))[:, None]
    return total


def _sum_bound(
    y: Array,
    magnitude: Array,
    squares: Array,
    n: Size,
    a: Arithmetic,
    *,
    roundings: tuple[str, ...],
    carried: tuple[Size, Size],
    each: float = 0.0,
) -> Bound:
    """Bound of a sum of n products; `each` rounds every addend, `roundings` are points that the sum passes."""
    last = compound(sum(a.at(point) for point in roundings[:-1]))
    last = (1 + last) * (1 + a.at(roundings[-1])) - 1
    return bound(
        a,
        f"{int(np.max(n))} roundings of a sum in any order in {a.words(*roundings)}",
        y.shape,
        firm=last * np.abs(y),
        loose=(gamma(n, a.unit) + each) * magnitude * (1 + last),
        chance=(chance_of_sum(y, squares, n, a.unit) + each**2 * squares) * (1 + last) ** 2,
        agreeing=swallowed_by_one(magnitude, squares, n, a.unit) * (1 + last),
        carried=carried,
    )
