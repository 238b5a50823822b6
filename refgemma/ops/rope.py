"""Rotary position embedding: each head is turned by angles that grow with position.

Lane i of the first half and lane i of the second half are the two coordinates of a point; at position p it is turned by
``p * theta ** (-2 i / H)``. A product of two turned vectors depends on the distance of their positions only.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from refgemma.numerics import FLOAT32, Array, Numerics, namespace_of


def rope_table(positions: Array, head_dim: int, theta: float, *, numerics: Numerics = FLOAT32) -> tuple[Array, Array]:
    """Cosine and sine of every lane's angle at every position.

    Parameters
    ----------
    positions : ndarray of int, shape (B, T)
        Absolute positions, from 0 at the first real token; integers up to here, since bfloat16 cannot count past 256.
    head_dim : int
        Width of a head, H; even.
    theta : float
        Base of the frequencies.
    numerics : Numerics
        Dtype of the result; where values are rounded.

    Returns
    -------
    cos, sin : ndarray, shape (B, T, H / 2)
        In the dtype of `numerics`.

    Notes
    -----
    Angles are formed in float64 and rounded once, as cosines and sines. In float32 the angle itself is off by up to
    5e-4 at position 8191; engines that do that are imitated through the points ``rope.exponent`` to ``rope.angle``.

    References
    ----------
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, section 3.2.2.
    """
    xp = namespace_of(positions)
    exponent = numerics.round("rope.exponent", xp.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # H/2
    if "rope.timescale" in numerics.rounding:  # a power and its inverse, two roundings
        frequency = 1 / numerics.round("rope.timescale", theta**exponent)
    else:
        frequency = theta**-exponent
    frequency = numerics.round("rope.frequency", frequency)
    angle = numerics.round("rope.angle", positions[..., None] * frequency)  # B T H/2
    cos, sin = (f(angle).astype(numerics.dtype, copy=False) for f in (xp.cos, xp.sin))
    return numerics.round("rope.table", cos), numerics.round("rope.table", sin)


def rope(x: Array, cos: Array, sin: Array, *, numerics: Numerics = FLOAT32) -> Array:
    """Turn each head of each token by the angles of its position.

    Parameters
    ----------
    x : ndarray, shape (B, T, heads, H)
        Queries or keys.
    cos, sin : ndarray, shape (B, T, H / 2)
        From `rope_table`.
    numerics : Numerics
        Where values are rounded.

    Returns
    -------
    ndarray, shape (B, T, heads, H)
        In the dtype of `x`; each head has the length it had before.

    Notes
    -----
    Gemma pairs lane i with lane i + H/2, not with its neighbour 2i + 1 as the paper draws it.

    References
    ----------
    google-deepmind/gemma, ``positional_embeddings.py``, ``apply_rope``.
    """
    xp = namespace_of(x)
    cos, sin = cos[:, :, None], sin[:, :, None]  # BT1(H/2): the same for every head
    half_width = x.shape[-1] // 2
    first, second = x[..., :half_width], x[..., half_width:]
    rounded = partial(numerics.round, "rope.product")
    turned = xp.empty_like(x)
    xp.subtract(rounded(first * cos), rounded(second * sin), out=turned[..., :half_width])
    xp.add(rounded(second * cos), rounded(first * sin), out=turned[..., half_width:])
    return numerics.round("rope.out", turned)
