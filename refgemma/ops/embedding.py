"""Token ids become vectors: a row of the table each, times sqrt(D).

``embed(t) = table[t] * sqrt(D)``. The factor brings rows, which are small because the same table is also the output
head, to the size that the residual stream works with. It belongs to the lookup alone: the head uses the bare table.
"""

from __future__ import annotations

import math

from refgemma.numerics import FLOAT32, Array, Numerics
from refgemma.ops.linear import Adapted, Operand, low_rank_rows, table_rows, with_deltas


def embed(tokens: Array, table: Operand, *, numerics: Numerics = FLOAT32) -> Array:
    """Look up one row of the table for each token and scale it by sqrt(D).

    Parameters
    ----------
    tokens : ndarray of int, shape (B, T)
        Token ids in ``[0, V)``.
    table : Operand, shape (V, D)
        The embedding table, as stored. Deltas of an `Adapted` one hold `a` as (R, V) and `b` as (D, R).
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
    base, deltas = (table.base, table.deltas) if isinstance(table, Adapted) else (table, ())
    scale = numerics.round("embed.scale", math.sqrt(D))
    y = numerics.round("embed", table_rows(tokens, base, numerics) * scale)  # BTD
    if not deltas:
        return y
    # What an adapter changes is scaled with the rows, and rounded with them: see `refgemma.ops.linear.linear`.
    y = with_deltas(y, deltas, lambda delta, rows: low_rank_rows(tokens[rows], delta, numerics) * scale)
    return numerics.round("embed", y)
