"""Token ids become vectors: a row of the table each, times sqrt(D).

``embed(t) = table[t] * sqrt(D)``. The factor brings rows, which are small because the same table is also the output
head, to the size that the residual stream works with. It belongs to the lookup alone: the head uses the bare table.
"""

from __future__ import annotations

import math

from refgemma.numerics import FLOAT32, Array, Numerics
from refgemma.ops.linear import Operand, table_rows


def embed(tokens: Array, table: Operand, *, numerics: Numerics = FLOAT32) -> Array:
    """Look up one row of the table for each token and scale it by sqrt(D).

    Parameters
    ----------
    tokens : ndarray of int, shape (B, T)
        Token ids in ``[0, V)``.
    table : Operand, shape (V, D)
        The embedding table, as stored.
    numerics : Numerics
        Arithmetic of the result.

    Returns
    -------
    ndarray, shape (B, T, D)
        In the dtype of `numerics`.

    Notes
    -----
    Engines differ in the factor's precision: sqrt(2048) = 45.2548 in float32 is 45.25 in bfloat16 (point
    ``embed.scale``).

    References
    ----------
    Vaswani et al., "Attention Is All You Need", 2017, section 3.4; google-deepmind/gemma, ``modules.py``, ``Embedder``.
    """
    D = table.shape[-1]
    rows = table_rows(tokens, table, numerics)  # BTD
    scale = numerics.round("embed.scale", numerics.scalar(math.sqrt(D)))
    return numerics.round("embed", rows * scale)
