"""Rounding bounds of element-wise operations: embedding, residual add, rotary embedding, GELU and its product.

Each function takes the exact result (float64, computed from the engine's own inputs), those inputs and the arithmetic;
it counts the roundings that any engine of that arithmetic makes, and says how far they reach.

For cos, sin, exp, tanh and a power engines call a library. How well that rounds is its own business: `LIBRARY` units in
the last place are allowed for each.

References
----------
Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, section 3.1; Zimmermann, "Accuracy of
Mathematical Functions in Single, Double, Extended Double and Quadruple Precision", 2021 (all float32 arguments tried,
library by library); NVIDIA, "CUDA C++ Programming Guide", appendix Mathematical Functions; Shibata and Petrogalli,
"SLEEF: A Portable Vectorized Library of C Standard Mathematical Functions", 2020 (1 and 3.5 units in the last place, by
the variant that is called).
"""

from __future__ import annotations

import math

import numpy as np

from refgemma.numerics import Array
from refgemma.ops.linear import Adapted, Operand
from refgemma.ops.rope import rope_table
from refgemma.oracle.bounds.arithmetic import Arithmetic
from refgemma.oracle.bounds.slack import Bound, Known, Size, bound
from refgemma.oracle.bounds.sums import gamma
from refgemma.oracle.thresholds import LIBRARY

CURVE = 2 * LIBRARY  # unit roundoffs of a library function's result


def embedding(y: Array, tokens: Array, table: Operand, a: Arithmetic) -> Bound:
    """Bound of the scaled embedding, y (B, T, D), of tokens (B, T): sqrt(D) is rounded, then the product."""
    firm = (gamma(2, a.unit) + a.at("embed.scale") + a.at("embed")) * np.abs(y)
    if isinstance(table, Adapted):
        for delta in table.deltas:
            rank = len(delta.a)
            size = np.abs(np.asarray(delta.a.T[tokens], np.float64)) @ np.abs(np.asarray(delta.b, np.float64)).T
            size *= abs(delta.scale) * math.sqrt(y.shape[-1])
            firm = firm + (gamma(rank + 4, a.unit) + 3 * a.at("embed")) * (size + np.abs(y))
    return bound(a, f"sqrt(D) and its product rounded in {a.words('embed')}", y.shape, firm=firm)


def added(y: Array, x: Known, change: Known, point: str, a: Arithmetic) -> Bound:
    """Bound of a residual add, y (B, T, D): one rounding."""
    carried: tuple[Size, Size] = (0.0, 0.0)
    if not (x.exact and change.exact):
        carried = (x.worst + change.worst + np.zeros(y.shape), x.variance + change.variance)
    firm = (a.unit + a.at(point)) * np.abs(y)
    return bound(a, f"one sum in {a.words(point)}", y.shape, firm=firm, carried=carried)


def rotation(y: Array, x: Known, positions: Array, theta: float, a: Arithmetic) -> Bound:
    """Bound of the rotary embedding, y (B, T, heads, H), at positions (B, T)."""
    H = x.value.shape[-1]
    exponent = np.arange(0, H, 2) / H
    steps = 2 * exponent * math.log(theta) + CURVE + 2
    relative = steps * a.unit + exponent * math.log(theta) * a.at("rope.exponent")
    relative = relative + sum(a.at(f"rope.{point}") for point in ("timescale", "frequency", "angle"))
    relative = np.where(exponent > 0, relative, a.at("rope.angle"))
    angle_slack = (np.maximum(positions, 0)[..., None] * theta**-exponent * relative)[:, :, None]  # BT1(H/2)
    cos, sin = (t[:, :, None] for t in rope_table(positions, H, theta, numerics=a.reference))

    def table_slack(here: Array, other: Array) -> Array:  # cos(p + d) - cos(p): |sin(p)| d and half d squared
        bent = np.minimum(np.abs(other) * angle_slack + np.square(angle_slack) / 2, 2)
        narrow = a.at("rope.table")
        size = np.abs(here)
        slack: Array = (bent + CURVE * a.unit * size) * (1 + narrow) + narrow * size
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
    reason = f"angles up to position {int(positions.max())}, their table, two products and a sum in {a.words('rope')}"
    return bound(a, reason, y.shape, firm=firm * (1 + last) + last * np.abs(y), carried=carried)


def gelu(y: Array, x: Known, a: Arithmetic) -> Bound:
    """Bound of the activation, y (B, T, F)."""
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
    bent = np.minimum(slope * reach, 2) + (CURVE * a.unit + a.at("gelu.tanh")) * np.abs(tanh)
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
    reason = f"seven roundings up to the tangent, four after it in {a.words('gelu', 'mlp.act')}"
    return bound(a, reason, y.shape, firm=firm * (1 + last) + last * np.abs(y), carried=carried)


def gated(y: Array, act: Known, up: Known, a: Arithmetic) -> Bound:
    """Bound of the gated product, y (B, T, F): one rounding."""
    carried: tuple[Size, Size] = (0.0, 0.0)
    if not (act.exact and up.exact):
        left, right = np.abs(act.value), np.abs(up.value)
        carried = (
            act.worst * (right + up.worst) + left * up.worst,
            act.variance * (np.square(right) + up.variance) + np.square(left) * up.variance,
        )
    firm = (a.unit + a.at("mlp.gated")) * np.abs(y)
    return bound(a, f"one product in {a.words('mlp.gated')}", y.shape, firm=firm, carried=carried)
