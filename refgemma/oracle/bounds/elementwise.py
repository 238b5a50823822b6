"""Rounding bounds of the operations that bend: rotary embedding, softmax, GELU and the product it gates.

They call a library for exp, tanh, cos, sin and a power. How well those round is the library's own business; LIBRARY
units in the last place are allowed for each. glibc, SLEEF (which torch vectorises with), NumPy and CUDA all state or
were measured to stay within that; torch's and NumPy's are measured again by the tests of this project.

References
----------
Zimmermann, "Accuracy of Mathematical Functions in Single, Double, Extended Double and Quadruple Precision", 2021 (all
float32 arguments tried, library by library); NVIDIA, "CUDA C++ Programming Guide", appendix Mathematical Functions;
Shibata and Petrogalli, "SLEEF: A Portable Vectorized Library of C Standard Mathematical Functions", 2020 (1 and 3.5
units in the last place, by the variant that is called).
"""

from __future__ import annotations

import math

import numpy as np

from refgemma.numerics import Array
from refgemma.ops.rope import rope_table
from refgemma.oracle.bounds.arithmetic import Arithmetic
from refgemma.oracle.bounds.slack import Bound, Known, Size, bound
from refgemma.oracle.bounds.sums import chance_of_sum, gamma, swallowed

LIBRARY = 4  # units in the last place, each at most two unit roundoffs of the result
_CURVE = 2 * LIBRARY


def rotation(y: Array, x: Known, positions: Array, theta: float, a: Arithmetic) -> Bound:
    """Bound of the rotary embedding. y (B, T, heads, H), positions (B, T)."""
    H = x.value.shape[-1]
    exponent = np.arange(0, H, 2) / H
    steps = 2 * exponent * math.log(theta) + _CURVE + 2
    relative = steps * a.unit + exponent * math.log(theta) * a.at("rope.exponent")
    relative = relative + sum(a.at(f"rope.{point}") for point in ("timescale", "frequency", "angle"))
    relative = np.where(exponent > 0, relative, a.at("rope.angle"))
    angle_slack = (np.maximum(positions, 0)[..., None] * theta**-exponent * relative)[:, :, None]  # BT1(H/2)
    cos, sin = (t[:, :, None] for t in rope_table(positions, H, theta, numerics=a.reference))

    def table_slack(here: Array, other: Array) -> Array:  # cos(p + d) - cos(p): |sin(p)| d and half d squared
        bent = np.minimum(np.abs(other) * angle_slack + np.square(angle_slack) / 2, 2)
        narrow = a.at("rope.table")
        size = np.abs(here)
        slack: Array = (bent + _CURVE * a.unit * size) * (1 + narrow) + narrow * size
        return slack

    cos_slack, sin_slack = table_slack(cos, sin), table_slack(sin, cos)
    first, second = np.split(np.abs(x.value), 2, axis=-1)
    each = gamma(2, a.unit) + a.at("rope.product") * (1 + a.unit)  # a product and the sum

    def slack(left: Array, right: Array) -> Array:
        table = left * cos_slack + right * sin_slack
        total: Array = table + each * (left * np.abs(cos) + right * np.abs(sin) + table)
        return total

    firm = np.concatenate([slack(first, second), slack(second, first)], axis=-1)
    carried: tuple[Size, Size] = (0.0, 0.0)
    if not x.exact:

        def turned(slack: Size, cos: Array, sin: Array) -> Array:
            first, second = np.split(np.broadcast_to(slack, x.value.shape), 2, axis=-1)
            return np.concatenate([first * cos + second * sin, second * cos + first * sin], axis=-1)

        carried = (turned(x.worst, np.abs(cos), np.abs(sin)), turned(x.variance, np.square(cos), np.square(sin)))
    last = a.at("rope.out")
    farthest = int(positions.max())
    return bound(
        a,
        f"angles up to position {farthest}, their table, two products and a sum in {_words(a)}",
        firm=firm * (1 + last) + last * np.abs(y),
        carried=carried,
        shape=y.shape,
    )


def softmax(y: Array, scores: Known, allowed: Array, a: Arithmetic) -> Bound:
    """Bound of the attention probabilities.

    Scores off by d_i at most change ``p_i`` by a factor between ``exp(-d_i) / E exp(d)`` and ``exp(d_i) E exp(d)``, E
    the mean under p: by Jensen's inequality ``1 / E exp(-d) <= E exp(d)``.

    y (B, N, T, S), allowed (B, T, S).
    """
    mask = allowed[:, None]
    masked = np.where(mask, scores.value, -np.inf)
    highest = masked.max(axis=-1, keepdims=True)
    depth = np.where(mask, np.where(np.isfinite(highest), highest, 0) - np.where(mask, scores.value, 0), 0)
    own = depth * (3 * a.unit + a.at("attn.shifted")) + _CURVE * a.unit + a.at("attn.exp")
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
        f"exponentials up to {depth.max():.3g} below the largest, a sum of {int(n.max())}, a division in {_words(a)}",
        firm=(np.minimum(firm, 1) + total * off) * (1 + last) + last * y,
        loose=off * gamma(n, a.unit) * (1 + last),
        chance=chance_of_sum(off, np.square(off) * np.sum(np.square(y), axis=-1, keepdims=True), n, a.unit),
        agreeing=off * swallowed(y, a.unit) * (1 + last),
        carried=carried,
        shape=y.shape,
    )


def gelu(y: Array, x: Known, a: Arithmetic) -> Bound:
    """Bound of the activation. y (B, T, F)."""
    size = np.abs(x.value)
    cubic = 0.044715 * np.square(x.value)
    inner = math.sqrt(2 / math.pi) * size * (1 + cubic)
    tanh = np.tanh(math.sqrt(2 / math.pi) * x.value * (1 + cubic))
    of_cube = sum(a.at(f"gelu.{point}") for point in ("square", "cube", "term")) + a.at("gelu.constant")
    outside = a.at("gelu.sum") + a.at("gelu.inner") + a.at("gelu.constant")
    with np.errstate(over="ignore"):
        relative = np.expm1((7 * a.unit + outside + of_cube * cubic / (1 + cubic)) / (1 - 2.0**-8))
        reach = relative * inner
        # The slope of the tangent is at most one, and at most 4 exp(-2 |z|) at distance |z| from zero.
        slope = np.minimum(1, np.maximum(1 - np.square(tanh), 4 * np.exp(-2 * np.maximum(inner - reach, 0))))
    bent = np.minimum(slope * reach, 2) + (_CURVE * a.unit + a.at("gelu.tanh")) * np.abs(tanh)
    bent = bent + (a.unit + a.at("gelu.shifted")) * (1 + tanh + bent)
    last = a.at("mlp.act")
    firm = 0.5 * size * bent * (1 + 2 * a.unit) + 2 * a.unit * np.abs(y)
    carried: tuple[Size, Size] = (0.0, 0.0)
    if not x.exact:  # the curve's slope is between -0.13 and 1.13, its bend at most 0.8
        steep = 0.5 * (1 + tanh) + 0.5 * x.value * (1 - np.square(tanh)) * math.sqrt(2 / math.pi) * (1 + 3 * cubic)
        steep = np.abs(steep)
        spread = np.sqrt(x.variance)
        carried = (
            np.minimum(steep * x.worst + 0.4 * np.square(x.worst), 1.13 * x.worst),
            np.square(np.minimum(steep * spread + 0.4 * np.square(spread), 1.13 * spread)),
        )
    return bound(
        a,
        f"seven roundings up to the tangent, four after it in {_words(a)}",
        firm=firm * (1 + last) + last * np.abs(y),
        carried=carried,
        shape=y.shape,
    )


def gated(y: Array, act: Known, up: Known, a: Arithmetic) -> Bound:
    """Bound of the gated product: one rounding. y (B, T, F)."""
    carried: tuple[Size, Size] = (0.0, 0.0)
    if not (act.exact and up.exact):
        left, right = np.abs(act.value), np.abs(up.value)
        carried = (
            act.worst * (right + up.worst) + left * up.worst,
            act.variance * (np.square(right) + up.variance) + np.square(left) * up.variance,
        )
    firm = (a.unit + a.at("mlp.gated")) * np.abs(y)
    return bound(a, f"one product in {_words(a)}", firm=firm, carried=carried, shape=y.shape)


def _words(a: Arithmetic) -> str:
    wide = "float32" if a.unit == 2.0**-24 else "float64"
    return wide + (f", rounded to {a.storage}" if a.points else "")
