"""How rounding bounds are derived; the bounds of the embedding, norms and residual adds.

Each function takes the exact result (float64, computed from the engine's own inputs), those inputs, and the
arithmetic; it counts the roundings that any engine of that arithmetic makes, in whatever order it sums, and says how
far they reach. With u the unit roundoff, n roundings in a row reach at most ``gamma(n) = n u / (1 - n u)``; what sums
add by chance is in `refgemma.oracle.bounds.sums`.

References
----------
Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, section 3.1.
"""

from __future__ import annotations

import math

import numpy as np

from refgemma.numerics import Array
from refgemma.ops.linear import Adapted, Operand
from refgemma.oracle.bounds.arithmetic import Arithmetic
from refgemma.oracle.bounds.slack import Bound, Known, Size, bound
from refgemma.oracle.bounds.sums import gamma, swallowed


def embedding(y: Array, tokens: Array, table: Operand, a: Arithmetic) -> Bound:
    """Bound of the scaled embedding: sqrt(D) is rounded, then the product. y (B, T, D), tokens (B, T)."""
    firm = (gamma(2, a.unit) + a.at("embed.scale") + a.at("embed")) * np.abs(y)
    if isinstance(table, Adapted):
        for delta in table.deltas:
            rank = len(delta.a)
            size = np.abs(np.asarray(delta.a.T[tokens], np.float64)) @ np.abs(np.asarray(delta.b, np.float64)).T
            size *= abs(delta.scale) * math.sqrt(y.shape[-1])
            firm = firm + (gamma(rank + 4, a.unit) + 3 * a.at("embed")) * (size + np.abs(y))
    return bound(a, f"sqrt(D) and its product rounded in {formats(a, 'embed')}", firm=firm, shape=y.shape)


def norm(y: Array, x: Known, weight: Array, eps: float, a: Arithmetic) -> Bound:
    """Bound of an RMS norm.

    NVIDIA, "CUDA C++ Programming Guide", appendix Mathematical Functions, table of maximum errors.

    y (B, T, D), weight (D,).
    """
    D = x.value.shape[-1]
    square = np.square(x.value)
    mean = square.mean(axis=-1, keepdims=True)
    share = mean / (mean + eps)  # of the mean square in what is under the root
    inner = (a.at("norm.mean") + a.at("norm.shifted") + a.at("norm.eps") * (1 - share)) / 2
    inner = inner + sum(a.at(f"norm.{point}") for point in ("inverse", "normed", "gain")) + 7 * a.unit
    many = share * (gamma(D + 1, a.unit) + a.at("norm.square")) / 2 + a.unit
    # In the terms of `chance_of_sum`, q**2 / s**2: 1 / D where all channels are alike, 1 where one is all there is.
    quartic = np.square(square).mean(axis=-1, keepdims=True) / np.maximum(D * np.square(mean), 1e-300)
    summed = D / 3 + (D / 2 + 1) * quartic + 2  # the sum, then a division and an addition
    chance = np.square(share / 2) * (a.unit**2 * summed + a.at("norm.square") ** 2 * quartic)
    lost = share / 2 * swallowed(square, a.unit) / np.maximum(D * mean, 1e-300)
    last = a.at("norm.out")
    size = np.abs(y)
    carried: tuple[Size, Size] = (0.0, 0.0)
    if not x.exact:  # y_i = x_i r g_i and dr / r = -r**2 mean(x dx)
        slope = np.abs(1 + weight.astype(np.float64)) / np.sqrt(mean + eps)  # of y_i by x_i, the rms held
        pull = np.abs(x.value) / (mean + eps)
        carried = (
            slope * (x.worst + pull * np.mean(np.abs(x.value) * x.worst, axis=-1, keepdims=True)),
            np.square(slope)
            * (x.variance + np.square(pull) * np.mean(square * x.variance, axis=-1, keepdims=True) / D),
        )
    return bound(
        a,
        f"mean of {D} squares (any order), root, gain in {formats(a, 'norm')}",
        firm=size * ((1 + compound(inner)) * (1 + last) - 1),
        loose=size * compound(many) * (1 + last) * (1 + compound(inner)),
        chance=np.square(size) * chance,
        agreeing=size * lost * (1 + last) * (1 + compound(inner)),
        carried=carried,
        shape=y.shape,
    )


def added(y: Array, x: Known, change: Known, point: str, a: Arithmetic) -> Bound:
    """Bound of a residual add: one rounding. y (B, T, D)."""
    return bound(
        a,
        f"one sum in {formats(a, point)}",
        firm=(a.unit + a.at(point)) * np.abs(y),
        carried=(0.0, 0.0)
        if x.exact and change.exact
        else (x.worst + change.worst + np.zeros(y.shape), x.variance + change.variance),
        shape=y.shape,
    )


def compound(total: Size) -> Size:
    """Most that several relative errors reach together."""
    return np.expm1(total / (1 - 2.0**-8))


def formats(a: Arithmetic, *points: str) -> str:
    """Words for what is rounded to what."""
    wide = "float32" if a.unit == 2.0**-24 else "float64"
    rounded = any(p == point or p.startswith(point + ".") for p in a.points for point in points)
    return f"{wide} ({a.unit:.1e} each)" + (f", rounded to {a.storage} ({a.narrow:.1e})" if rounded else "")
