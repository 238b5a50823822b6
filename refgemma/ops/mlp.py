"""The curve of the gated MLP, "GeGLU": ``down(gelu(gate(x)) * up(x))``, with GELU in its tanh form.

The matrix products and the product of the two halves are in `refgemma.model`.
"""

from __future__ import annotations

import math

import numpy as np

from refgemma.compute.threads import elementwise
from refgemma.numerics import FLOAT32, Array, Numerics, namespace_of


def gelu(x: Array, *, numerics: Numerics = FLOAT32) -> Array:
    """Smooth gate, near 0 for negative and near x for positive input.

    Parameters
    ----------
    x : ndarray, any shape
        Gate values before the activation.
    numerics : Numerics
        Where values are rounded.

    Returns
    -------
    ndarray, same shape and dtype
        ``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3)))``.

    Notes
    -----
    Gemma 1's files say ``"gelu"``, which elsewhere means the erf form; the models were trained with this one. The two
    differ by at most 4.7e-4, at abs(x) = 2.70.

    References
    ----------
    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2; Shazeer, "GLU Variants Improve Transformer",
    2020.
    """
    act = _gelu_by_steps(x, numerics) if "gelu" in numerics.stepwise else elementwise(_gelu, x)
    return numerics.round("mlp.act", act)


def _gelu(x: Array, out: Array | None = None) -> Array:
    """The formula with one buffer, the result: this is the widest activation of the model."""
    xp = namespace_of(x)
    inner: Array = xp.empty_like(x) if out is None else out
    xp.square(x, out=inner)
    inner *= 0.044715
    inner += 1
    inner *= x  # x + 0.044715 x**3
    inner *= math.sqrt(2 / math.pi)
    xp.tanh(inner, out=inner)
    inner += 1
    inner *= x
    inner *= 0.5
    return inner


def _gelu_by_steps(x: Array, numerics: Numerics) -> Array:
    """The formula in the order in which it is written, each step with its rounding point."""
    xp = namespace_of(x)
    slope, cubic = (numerics.round("gelu.constant", value) for value in (math.sqrt(2 / math.pi), 0.044715))
    cube = numerics.round("gelu.cube", numerics.round("gelu.square", x * x) * x)
    total = numerics.round("gelu.sum", x + numerics.round("gelu.term", cubic * cube))
    inner = numerics.round("gelu.inner", slope * total)
    # In float64, because below -3 almost nothing is left of one plus the tangent: there its last digit decides.
    tanh = numerics.round("gelu.tanh", xp.tanh(inner.astype(np.float64)).astype(x.dtype))
    curve: Array = (0.5 * x) * numerics.round("gelu.shifted", 1 + tanh)
    return curve
