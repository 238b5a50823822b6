"""RMSNorm: each vector is divided by its root mean square, then multiplied by a learned gain.

``y = x / sqrt(mean(x**2) + eps) * (1 + weight)``. Gemma stores the gain as its distance from one, so a weight of zero
changes nothing.
"""

from __future__ import annotations

from refgemma.errors import InputError
from refgemma.numerics import FLOAT32, Array, Numerics, namespace_of


def rms_norm(x: Array, weight: Array, *, eps: float, numerics: Numerics = FLOAT32) -> Array:
    """Divide each vector by its root mean square, then apply the learned gain.

    Parameters
    ----------
    x : ndarray, shape (..., D)
        Activations, float32 or float64; the last axis is normalised.
    weight : ndarray, shape (D,)
        Gain minus one, as stored in the checkpoint.
    eps : float
        Added to the mean square, inside the root; same units as ``x**2``.
    numerics : Numerics
        Where values are rounded.

    Returns
    -------
    ndarray, shape (..., D)
        In the dtype of `x`. A vector of zeros stays zero.

    Raises
    ------
    ValueError
        If `weight` is not one number per channel of `x`.

    Notes
    -----
    The gain is applied before the result is narrowed, not after, and ``1 + weight`` is formed in the dtype of `x`: in
    bfloat16 that sum alone would cost up to 0.4 % (points ``norm.normed`` and ``norm.gain``).

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4. The unit offset is Gemma's own:
    google-deepmind/gemma, ``layers.py``, ``RMSNorm``.
    """
    if weight.shape != x.shape[-1:]:
        raise InputError(f"weight has shape {weight.shape}, x has {x.shape[-1]} channels: expected ({x.shape[-1]},)")
    if "norm" in numerics.stepwise:
        normed = _normed_by_steps(x, eps, numerics)
    else:
        xp = namespace_of(x)
        mean_square = xp.square(x).sum(axis=-1, keepdims=True)
        mean_square /= x.shape[-1]  # bit for bit the result of `mean`, which takes twice as long on one token
        normed = x / xp.sqrt(mean_square + eps)
    gain = numerics.round("norm.gain", 1 + weight.astype(x.dtype, copy=False))
    normed *= gain
    return numerics.round("norm.out", normed)


def _normed_by_steps(x: Array, eps: float, numerics: Numerics) -> Array:
    """``x / sqrt(mean(x**2) + eps)``, each step with its rounding point."""
    xp = namespace_of(x)
    square = numerics.round("norm.square", xp.square(x))
    mean_square = numerics.round("norm.mean", xp.mean(square, axis=-1, keepdims=True))  # ... 1
    rms = xp.sqrt(numerics.round("norm.shifted", mean_square + numerics.round("norm.eps", eps)))
    # Dividing by the root is one rounding less than multiplying by its inverse, which is what engines do.
    normed: Array = x * numerics.round("norm.inverse", 1 / rms) if "norm.inverse" in numerics.rounding else x / rms
    return numerics.round("norm.normed", normed)
