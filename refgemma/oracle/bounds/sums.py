"""How far the roundings of a sum reach, in the worst case and by chance; bounds of RMS norm and softmax.

The worst case over all orders of summation is ``gamma(n) sum|x_i w_i|``. By chance far less: the k-th addition is
off by at most ``u |s_k|``, s_k the sum so far, independently of the others, so what counts is ``sum s_k**2``. In an
order that has nothing to do with the numbers, s_k goes from 0 to the whole sum s as a random walk that is tied down at
both ends: ``(k/n) s`` give or take a Brownian bridge of size ``q = sqrt(sum (x_i w_i)**2)``. The first part adds up to
``n s**2 / 3``; the second to ``n q**2`` times 1/6 on average and below 1/2 for 96 of 100 orders (the distribution of
Cramer and von Mises). So ``n (s**2 / 3 + q**2 / 2)``; the n products add ``q**2``. Adding in blocks only makes the s_k
smaller.

Roundings are not independent where one addend is so large that the others are below the unit of the sum: added to it
one by one they vanish, all the same way. What is lost is at most each of them, so all of them together are allowed for.

References
----------
Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, sections 3.1 and 4.2 (gamma; any order);
Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019 (independent
roundings: sqrt(n) in place of n) and "Sharper Probabilistic Backward Error Analysis for Basic Linear Algebra Kernels
with Random Data", 42, 2020 (what the mean and spread of the data add to that); Anderson and Darling, "Asymptotic Theory
of Certain Goodness of Fit Criteria Based on Stochastic Processes", 1952, table 1 (quantiles of the square of a bridge).
"""

from __future__ import annotations

import numpy as np

from refgemma.numerics import Array
from refgemma.oracle.bounds.arithmetic import Arithmetic
from refgemma.oracle.bounds.slack import Bound, Known, Size, bound
from refgemma.oracle.thresholds import LIBRARY


def gamma(n: Size, unit: float) -> Size:
    """Worst relative error of n roundings in a row (Higham, 2002, lemma 3.1)."""
    reach = np.asarray(n * unit)
    return np.where(reach < 1, reach / np.maximum(1 - reach, 1e-300), np.inf)


def compound(total: Size) -> Size:
    """Most that several relative errors, `total` by simple addition, reach together."""
    return np.expm1(total / (1 - 2.0**-8))


def chance_of_sum(exact: Array, squares: Array, n: Size, unit: float) -> Array:
    """Variance of the error of a sum of n products, as derived above; squares: the sum of their squares."""
    variance: Array = unit**2 * (n * (np.square(exact) / 3 + squares / 2) + squares)
    return variance


def swallowed(addends: Array, unit: float) -> Array:
    """Most that vanishes of positive addends (..., n), one large and added first, as the others are below its unit."""
    ulp = 2 * unit * addends.sum(axis=-1, keepdims=True)
    lost: Array = np.where(addends <= ulp, np.minimum(addends, ulp / 2), 0).sum(axis=-1, keepdims=True)
    return lost


def swallowed_by_one(magnitude: Array, squares: Array, n: Size, unit: float) -> Array:
    """Same of addends of which only the sums of magnitudes and of squares are known."""
    others = np.maximum(magnitude - np.sqrt(squares), 0)
    lost: Array = np.where(others <= 2 * n * unit * magnitude, others, 0)
    return lost


def norm(y: Array, x: Known, weight: Array, eps: float, a: Arithmetic) -> Bound:
    """Bound of an RMS norm, y (B, T, D), with a gain weight (D,)."""
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
        f"mean of {D} squares (any order), root, gain in {a.words('norm')}",
        y.shape,
        firm=size * ((1 + compound(inner)) * (1 + last) - 1),
        loose=size * compound(many) * (1 + last) * (1 + compound(inner)),
        chance=np.square(size) * chance,
        agreeing=size * lost * (1 + last) * (1 + compound(inner)),
        carried=carried,
    )


def softmax(y: Array, scores: Known, allowed: Array, a: Arithmetic) -> Bound:
    """Bound of the attention probabilities, y (B, N, T, S), of the keys that are allowed (B, T, S).

    Scores off by d_i at most change ``p_i`` by a factor between ``exp(-d_i) / E exp(d)`` and ``exp(d_i) E exp(d)``, E
    the mean under p: by Jensen's inequality ``1 / E exp(-d) <= E exp(d)``.
    """
    mask = allowed[:, None]
    masked = np.where(mask, scores.value, -np.inf)
    highest = masked.max(axis=-1, keepdims=True)
    depth = np.where(mask, np.where(np.isfinite(highest), highest, 0) - np.where(mask, scores.value, 0), 0)
    own = depth * (3 * a.unit + a.at("attn.shifted")) + 2 * LIBRARY * a.unit + a.at("attn.exp")
    n = np.maximum(mask.sum(axis=-1, keepdims=True), 1)
    last = a.at("attn.probs")
    total = 2 * a.unit + a.at("attn.total")

    def factor(d: Array) -> Array:  # most that a probability changes by, relatively
        with np.errstate(over="ignore", invalid="ignore"):
            grown = np.exp(d)
            most: Array = np.nan_to_num(grown * np.sum(y * grown, axis=-1, keepdims=True) - 1, nan=np.inf)
        return most

    carried: tuple[Size, Size] = (0.0, 0.0)
    firm = y * factor(own)
    off = y + np.minimum(firm, 1)  # what is divided by a sum that is off is off already
    if not scores.exact:
        slack = np.where(mask, scores.worst, 0)
        variance = np.where(mask, scores.variance, 0)
        carried = (
            np.minimum(y * factor(own + slack), 1) - np.minimum(firm, 1),
            np.square(y) * (variance + np.sum(np.square(y) * variance, axis=-1, keepdims=True)),
        )
    return bound(
        a,
        f"exponentials up to {depth.max():.3g} below the largest, a sum of {int(n.max())}, a division in "
        + a.words("attn.shifted", "attn.exp", "attn.total", "attn.probs"),
        y.shape,
        firm=(np.minimum(firm, 1) + total * off) * (1 + last) + last * y,
        loose=off * gamma(n, a.unit) * (1 + last),
        chance=chance_of_sum(off, np.square(off) * np.sum(np.square(y), axis=-1, keepdims=True), n, a.unit),
        agreeing=off * swallowed(y, a.unit) * (1 + last),
        carried=carried,
    )
