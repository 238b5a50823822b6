"""The activation of Gemma's gated MLP: GELU in its tanh form.

The MLP is ``down(gelu(gate(x)) * up(x))``, "GeGLU"; its three matrix products stand in `refgemma.model`, the curve
and the product of the two halves here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from refgemma.numerics import FLOAT32, Array, Numerics, namespace_of
from refgemma.ops.threads import in_parallel

# Numbers that a thread takes at once. Fewer would stay in a core's own cache through all nine steps, but between the
# steps only one thread goes on at a time.
_PART = 2**18


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
    if numerics.inside("gelu"):
        return numerics.round("mlp.act", _gelu_by_steps(x, numerics))
    act = namespace_of(x).empty_like(x)
    _side_by_side(_gelu_in_place, x, act)
    return numerics.round("mlp.act", act)


def multiply(act: Array, up: Array) -> Array:
    """Product of the two halves of the layer, number by number.

    Parameters
    ----------
    act, up : ndarray, shape (..., F)
        What opens the gate, and what goes through it. What a tap put there may be of other shapes or dtypes.

    Returns
    -------
    ndarray, shape (..., F)
        As ``act * up``.
    """
    alike = (
        isinstance(act, np.ndarray) and isinstance(up, np.ndarray) and (act.shape, act.dtype) == (up.shape, up.dtype)
    )
    if not alike:
        return act * up
    gated = np.empty_like(act)
    _side_by_side(lambda act, up, gated: np.multiply(act, up, out=gated), act, up, gated)
    return gated


def _side_by_side(work: Callable[..., object], *arrays: Array) -> None:
    """Do some work, number by number, on arrays of one shape: threads take some of each, in pieces of memory."""
    x = arrays[0]
    if x.size <= _PART or namespace_of(x) is not np:
        work(*arrays)
        return
    outermost = max(range(x.ndim), key=lambda axis: abs(x.strides[axis]) if x.shape[axis] > 1 else 0)
    turned = [np.moveaxis(array, outermost, 0) for array in arrays]
    length = x.shape[outermost]
    step = max(1, _PART * length // x.size)
    parts = [slice(start, start + step) for start in range(0, length, step)]
    in_parallel(lambda part: work(*(array[parts[part]] for array in turned)), len(parts))


def _gelu_in_place(x: Array, inner: Array) -> None:
    """The formula with one buffer, which ends up as the result: this is the widest activation of the model."""
    xp = namespace_of(x)
    xp.square(x, out=inner)
    inner *= 0.044715
    inner += 1
    inner *= x
    inner *= math.sqrt(2 / math.pi)
    xp.tanh(inner, out=inner)
    inner += 1
    inner *= x
    inner *= 0.5


def _gelu_by_steps(x: Array, numerics: Numerics) -> Array:
    """The formula in the order in which it is written, each step with its rounding point."""
    xp = namespace_of(x)
    slope, cubic = (numerics.constant("gelu.constant", value) for value in (math.sqrt(2 / math.pi), 0.044715))
    cube = numerics.round("gelu.cube", numerics.round("gelu.square", x * x) * x)
    total = numerics.round("gelu.sum", x + numerics.round("gelu.term", cubic * cube))
    inner = numerics.round("gelu.inner", slope * total)
    # In float64, because below -3 almost nothing is left of one plus the tangent: there its last digit decides.
    tanh = numerics.round("gelu.tanh", xp.tanh(inner.astype(np.float64)).astype(x.dtype))
    curve: Array = (0.5 * x) * numerics.round("gelu.shifted", 1 + tanh)
    return curve
