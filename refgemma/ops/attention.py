"""Attention with grouped heads: every query is compared with every key it may see, and values are mixed accordingly.

``mix = softmax(scale * q k^T) v``, where query head n reads key/value head ``n // G``, G = N // K. Who may see whom
follows from positions alone, so padding and caches need no case of their own.
"""

from __future__ import annotations

import numpy as np

from refgemma.compute.products import product
from refgemma.numerics import FLOAT32, Array, Numerics, namespace_of


def allowed_keys(query_positions: Array, key_positions: Array) -> Array:
    """Mask of the keys that each query may attend to: real ones, not later than itself.

    Parameters
    ----------
    query_positions : ndarray of int, shape (B, T)
        Absolute positions; -1 marks padding, which attends to nothing.
    key_positions : ndarray of int, shape (B, S)
        Absolute positions; -1 marks padding and empty slots, which nothing attends to.

    Returns
    -------
    ndarray of bool, shape (B, T, S)
        True where the query may attend.
    """
    q, k = query_positions[:, :, None], key_positions[:, None, :]
    allowed: Array = (k >= 0) & (k <= q)
    return allowed


def attention_scores(q: Array, k: Array, *, scale: float, numerics: Numerics = FLOAT32) -> Array:
    """Score every query against every key, grouped-query style.

    ``BKGTH,BKSH->BKGTS`` as one batched matrix product per key/value head.

    Parameters
    ----------
    q : ndarray, shape (B, T, N, H)
        Queries, after RoPE.
    k : ndarray, shape (B, K, S, H)
        Keys, after RoPE, laid out as in the cache; K divides N.
    scale : float
        Multiplies the queries, once.
    numerics : Numerics
        Where values are rounded.

    Returns
    -------
    ndarray, shape (B, N, T, S)
        Before the mask.

    Notes
    -----
    Scaling the query is the cheaper order. Engines that scale the product instead round it first (point
    ``attn.product``), which differs unless the scale is a power of two.

    References
    ----------
    Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", 2023, section 2.
    """
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    G = N // K
    scale = numerics.round("attn.scale", scale)
    scale_after = "attn.product" in numerics.rounding
    if not scale_after:
        q = numerics.round("attn.query", q * scale)
    grouped = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)  # head n reads kv head n // G
    scores = product(grouped, k.swapaxes(-1, -2))  # BK(GT)S
    if scale_after:
        scores = numerics.round("attn.product", scores) * scale
    return numerics.round("attn.scores", scores.reshape(B, N, T, S))


def attention_probs(scores: Array, allowed: Array, *, numerics: Numerics = FLOAT32) -> Array:
    """Softmax of the scores over the allowed keys.

    Parameters
    ----------
    scores : ndarray, shape (B, N, T, S)
        From `attention_scores`.
    allowed : ndarray of bool, shape (B, T, S)
        From `allowed_keys`.
    numerics : Numerics
        Where values are rounded.

    Returns
    -------
    ndarray, shape (B, N, T, S)
        Rows sum to one; a query with no allowed key gets zeros, not NaN and not a uniform row.
    """
    xp = namespace_of(scores)
    masked = xp.where(allowed[:, None], scores, -np.inf)
    highest = masked.max(axis=-1, keepdims=True)
    # Rows with no key: any finite maximum will do, since exp(-inf) is zero, and zero over one stays zero.
    # The others have a total of at least one, which their highest score alone contributes.
    masked -= xp.maximum(highest, np.finfo(scores.dtype).min)
    masked = numerics.round("attn.shifted", masked)
    weights = numerics.round("attn.exp", xp.exp(masked, out=masked))
    total = numerics.round("attn.total", weights.sum(axis=-1, keepdims=True))
    weights /= xp.maximum(total, 1)
    return numerics.round("attn.probs", weights)


def attention_mix(probs: Array, v: Array, *, numerics: Numerics = FLOAT32) -> Array:
    """Sum of the values, weighted by the probabilities.

    ``BKGTS,BKSH->BKGTH`` as one batched matrix product per key/value head.

    Parameters
    ----------
    probs : ndarray, shape (B, N, T, S)
        From `attention_probs`.
    v : ndarray, shape (B, K, S, H)
        Values, laid out as in the cache.
    numerics : Numerics
        Where values are rounded.

    Returns
    -------
    ndarray, shape (B, T, N, H)
        One vector per query head.
    """
    B, N, T, S = probs.shape
    K, H = v.shape[1], v.shape[3]
    G = N // K
    mixed = product(probs.reshape(B, K, G * T, S), v)  # BK(GT)H
    mixed = mixed.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return numerics.round("attn.mix", mixed)
