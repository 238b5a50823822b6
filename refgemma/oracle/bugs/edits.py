"""How known bugs change a `Setup`: functions from one setup to another, or to None where the bug cannot show."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from refgemma.numerics import Array, Bfloat16Matrix, from_bfloat16, to_bfloat16
from refgemma.ops.linear import Adapted
from refgemma.oracle.bugs.port import Setup
from refgemma.params import at, changed

Edit: TypeAlias = Callable[[Setup], Setup | None]


def field(**fields: Any) -> Edit:
    """Set fields of the setup."""
    return lambda setup: setup.but(**fields)


# ---- rounding


def rounded(*points: str) -> Edit:
    """Round at these points to bfloat16; shows where the port does not do so anyway."""

    def edit(setup: Setup) -> Setup | None:
        numerics = setup.numerics
        for point in points:
            numerics = numerics.with_(point, "bfloat16")
        return None if numerics.rounding == setup.numerics.rounding else setup.but(numerics=numerics)

    return edit


def narrow_squares(setup: Setup) -> Setup | None:
    """Round the input of norms, its squares and the mean to bfloat16; shows where the input is not rounded anyway."""
    if "norm.out" in setup.numerics.rounding:
        return None
    # The rounding points loosen the bounds: a sum in another order may fall to the other side of a midpoint.
    return setup.but(
        numerics=setup.numerics.with_("norm.square", "bfloat16").with_("norm.mean", "bfloat16"), squares="bfloat16"
    )


def other_scale_precision(setup: Setup) -> Setup:
    """Round the scale of the embedding if the port does not, and the other way round."""
    if "embed.scale" in setup.numerics.rounding:
        return setup.but(numerics=setup.numerics.without("embed.scale"))
    return setup.but(numerics=setup.numerics.with_("embed.scale", "bfloat16"))


def wide_keys(setup: Setup) -> Setup | None:
    """Read keys of the same call before they are rounded; shows where keys are rounded at all."""
    return setup.but(fresh_keys="wide") if "rope.out" in setup.numerics.rounding else None


# ---- angles and positions


def float32_angles(*, divided: bool) -> Edit:
    """Form angles in float32; shows from position 8192 on."""

    def edit(setup: Setup) -> Setup | None:
        if setup.positions.max() < 8192:
            return None
        numerics = setup.numerics
        for point in ("rope.exponent", "rope.timescale", *([] if divided else ["rope.frequency"]), "rope.angle"):
            numerics = numerics.with_(point, "float32")
        return setup.but(numerics=numerics)

    return edit


def positions_in_bfloat16(setup: Setup) -> Setup | None:
    """Round positions before they are multiplied by a frequency; shows beyond 256."""
    exact = setup.positions if setup.rope_positions is None else setup.rope_positions
    narrow = from_bfloat16(to_bfloat16(exact.astype(np.float32))).astype(np.float64)
    return None if np.array_equal(narrow, exact) else setup.but(rope_positions=narrow)


def last_position(of: Callable[[Array, int], int]) -> Edit:
    """Give the last token of each row another position."""

    def edit(setup: Setup) -> Setup | None:
        exact = setup.positions if setup.rope_positions is None else setup.rope_positions
        moved = np.array(exact)
        for b, row in enumerate(setup.positions):
            if (row >= 0).any():
                last = int(np.flatnonzero(row >= 0)[-1])
                moved[b, last] = of(row, last)
        return None if np.array_equal(moved, exact) else setup.but(rope_positions=moved)

    return edit


# ---- tokens


def first_token(times: int) -> Edit:
    """Feed the first real token of each row this many times (0 or 2); later positions shift accordingly."""

    def edit(setup: Setup) -> Setup | None:
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
        return setup.but(tokens=tokens, positions=positions, rope_positions=None)

    return edit


# ---- weights and configuration


def bare_delta(setup: Setup) -> Setup | None:
    """Leave the factor sqrt(D) off the deltas of the embedding; shows where an adapter has any."""
    embed = setup.params["embed"]
    if not isinstance(embed, Adapted):
        return None
    root = math.sqrt(setup.config.hidden_size)
    deltas = tuple(replace(delta, scale=delta.scale / root) for delta in embed.deltas)
    return setup.but(params={**setup.params, "embed": replace(embed, deltas=deltas)})


def gain_plus(step: float) -> Edit:
    """Add a number to every norm weight."""

    def shifted(weight: Array) -> Array:
        return weight.astype(np.float64) + step

    def edit(setup: Setup) -> Setup:
        return setup.but(params=changed(setup.params, lambda path, w: shifted(w) if path.endswith("norm") else w))

    return edit


def swapped_gate(setup: Setup) -> Setup:
    """Exchange the gate and the up matrix of every MLP."""
    params, other = setup.params, {"gate": "up", "up": "gate"}

    def swapped(path: str, w: Any) -> Any:
        mlp, _, name = path.rpartition(".")
        return at(params, f"{mlp}.{other[name]}") if name in other else w

    return setup.but(params=changed(params, swapped))


def reshaped_gate(setup: Setup) -> Setup:
    """Read the numbers of every gate matrix (F, D) as (D, F), transposed: the right shape, the wrong numbers."""

    def reshaped(path: str, w: Any) -> Any:
        if not path.endswith(".gate"):
            return w
        if isinstance(w, Bfloat16Matrix):
            return Bfloat16Matrix(np.ascontiguousarray(w.bits.reshape(w.shape[::-1]).T))
        return np.ascontiguousarray(w.reshape(w.shape[::-1]).T)

    return setup.but(params=changed(setup.params, reshaped))


def larger_eps(setup: Setup) -> Setup:
    """Multiply the eps of every norm by ten."""
    return setup.but(config=replace(setup.config, rms_norm_eps=10 * setup.config.rms_norm_eps))


def scale_of_assumed_width(setup: Setup) -> Setup | None:
    """Scale queries by (D / N)**-0.5; shows where that is not the query scale."""
    c = setup.config
    layers = tuple(replace(row, query_scale=(c.hidden_size / row.num_heads) ** -0.5) for row in c.layers)
    return None if layers == c.layers else setup.but(config=replace(c, layers=layers))


def heads_in_turn(setup: Setup) -> Setup | None:
    """Read key head n % K for query head n; shows where 1 < K < N."""
    c = setup.config
    return setup.but(heads="in turn") if any(1 < row.num_kv_heads < row.num_heads for row in c.layers) else None
