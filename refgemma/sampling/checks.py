"""What a decision is made from, checked: logits, the uniform number, token ids."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence

import numpy as np

from refgemma.errors import InputError, InputTypeError
from refgemma.numerics import Array


def check_logits(logits: Array, u: float) -> Array:
    """Logits in float64, or a sentence on what is wrong."""
    logits = np.asarray(logits)
    if logits.ndim != 1 or not logits.size or logits.dtype.kind not in "fiu":
        raise InputError(
            f"logits are {logits.dtype} of shape {logits.shape}: expected one number per vocabulary entry, (V,)"
        )
    wide = logits.astype(np.float64)
    highest = wide.max()
    if np.isnan(highest):
        raise InputError(f"logits hold NaN, first for token {int(np.isnan(wide).argmax())}: no token can be chosen")
    if np.isinf(highest):
        reason = "all minus infinity" if highest < 0 else f"plus infinity for token {int(wide.argmax())}"
        raise InputError(f"logits are {reason}: no token can be chosen")
    given: object = u
    if not isinstance(given, numbers.Real):
        raise InputTypeError(f"u is {u!r}: expected a number in [0, 1)")
    if not 0 <= u < 1:
        raise InputError(f"u is {u!r}: expected a number in [0, 1)")
    return wide


def check_ids(name: str, tokens: Sequence[int], V: int) -> list[int]:
    """Token ids as plain numbers, or a sentence on what is wrong."""
    try:
        ids = [operator.index(token) for token in tokens]
    except TypeError:
        raise InputTypeError(f"{name} are {tokens!r:.60}: expected a list of token ids") from None
    for token in ids:
        if not 0 <= token < V:
            raise InputError(f"token id {token} of {name} is outside the vocabulary of {V} (ids from 0)")
    return ids
