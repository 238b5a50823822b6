"""Cuts, and the two tokens that each one parts: the last that it keeps and the first that it removes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps
from refgemma.sampling.steps.cuts import distances

CUTS: dict[str, Callable[[Array, Any], Array]] = {
    "top_k": steps.top_k,
    "top_p": steps.top_p,
    "min_p": steps.min_p,
    "typical": steps.typical,
}


def order_of(name: str, logits: Array) -> Array:
    """What a cut goes by: it keeps tokens from the highest number down. logits (n,)."""
    return -distances(logits)[0] if name == "typical" else logits


def border(order: Array, stays: Array) -> tuple[int, int | None]:
    """Places on both sides of a cut. order (n,), stays (n,)."""
    kept = np.flatnonzero(stays)
    last = len(kept) - 1 - int(order[kept][::-1].argmin())  # of those that tie the highest id goes first
    if len(kept) == len(order):
        return int(kept[last]), None
    others = order.copy()
    np.copyto(others, -np.inf, where=stays)
    return int(kept[last]), int(others.argmax())
