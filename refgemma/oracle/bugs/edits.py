"""What known bugs change in a `Setup`: functions from one setup to another, or to None where that cannot show.

Those that change weights and configuration are in `refgemma.oracle.bugs.weight_edits`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from refgemma.numerics import Array, from_bfloat16, to_bfloat16
from refgemma.oracle.bugs.setups import Setup

Change: TypeAlias = Callable[[Setup], Setup | None]


def field(**fields: Any) -> Change:
    """Other values for fields of the setup."""
    return lambda setup: setup.but(**fields)


# ---- rounding


def rounded(*points: str) -> Change:
    """Rounding points, rounded to bfloat16; shows where they are not anyway."""

    def change(setup: Setup) -> Setup | None:
        numerics = setup.numerics
        for point in points:
            numerics = numerics.with_(point, "bfloat16")
        return None if numerics.rounding == setup.numerics.rounding else setup.but(numerics=numerics)

    return change


def narrow_squares(setup: Setup) -> Setup | None:
    """Input of norms, its squares and their mean, rounded to bfloat16; shows where the input is not rounded anyway."""
    if "norm.out" in setup.numerics.rounding:
        return None
    # The rounding points count for the bounds: a sum in another order may fall to the other side of a midpoint.
    return setup.but(
        numerics=setup.numerics.with_("norm.square", "bfloat16").with_("norm.mean", "bfloat16"), squares="bfloat16"
    )


def other_scale_precision(setup: Setup) -> Setup:
    """Round the scale of the embedding where it was not rounded, and not where it was."""
    if "embed.scale" in setup.numerics.rounding:
        return setup.but(numerics=setup.numerics.without("embed.scale"))
    return setup.but(numerics=setup.numerics.with_("embed.scale", "bfloat16"))


def wide_keys(setup: Setup) -> Setup | None:
    """Fresh keys before they are rounded; shows where they are rounded at all."""
    return setup.but(fresh_keys="wide") if "rope.out" in setup.numerics.rounding else None


# ---- angles and positions


def float32_angles(*, divided: bool) -> Change:
    """Angles formed in float32; shows from position 8192 on."""

    def change(setup: Setup) -> Setup | None:
        if setup.positions.max() < 8192:
            return None
        numerics = setup.numerics
        for point in ("rope.exponent", "rope.timescale", *([] if divided else ["rope.frequency"]), "rope.angle"):
            numerics = numerics.with_(point, "float32")
        return setup.but(numerics=numerics)

    return change


def positions_in_bfloat16(setup: Setup) -> Setup | None:
    """Positions rounded before they are multiplied by a frequency; shows beyond 256."""
    exact = setup.positions if setup.turned_by is None else setup.turned_by
    narrow = from_bfloat16(to_bfloat16(exact.astype(np.float32))).astype(np.float64)
    return None if np.array_equal(narrow, exact) else setup.but(turned_by=narrow)


def last_position(of: Callable[[Array, int], int]) -> Change:
    """Another position for the last token of each row."""

    def change(setup: Setup) -> Setup | None:
        exact = setup.positions if setup.turned_by is None else setup.turned_by
        moved = np.array(exact)
        for b, row in enumerate(setup.positions):
            if (row >= 0).any():
                last = int(np.flatnonzero(row >= 0)[-1])
                moved[b, last] = of(row, last)
        return None if np.array_equal(moved, exact) else setup.but(turned_by=moved)

    return change


# ---- tokens


def first_token(times: int) -> Change:
    """First real token of each row fed not at all, or twice; those after it count on from it."""

    def change(setup: Setup) -> Setup | None:
        B, T = setup.tokens.shape
        real = setup.positions >= 0
        if real.sum(axis=1).min() + times < 2:
            return None
        tokens, positions = np.empty((2, B, T - 1 + times), np.int64)
        for b in range(B):
            at = int(np.argmax(real[b]))
            columns = [*range(at), *[at] * times, *range(at + 1, T)]
            tokens[b] = setup.tokens[b, columns]
            here = real[b, columns]
            positions[b] = np.where(here, setup.positions[b, at] + np.cumsum(here) - 1, -1)
        return setup.but(tokens=tokens, positions=positions, turned_by=None)

    return change
