"""What known bugs change in the weights and the configuration of a `Setup`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np

from refgemma.model import Params
from refgemma.numerics import Array, Bfloat16Matrix
from refgemma.ops.linear import Adapted
from refgemma.oracle.bugs.edits import Change
from refgemma.oracle.bugs.setups import Setup


def bare_delta(setup: Setup) -> Setup | None:
    """Deltas of the embedding without the factor sqrt(D); shows where an adapter has any."""
    embed = setup.params["embed"]
    if not isinstance(embed, Adapted):
        return None
    root = math.sqrt(setup.config.hidden_size)
    deltas = tuple(replace(delta, scale=delta.scale / root) for delta in embed.deltas)
    return setup.but(params={**setup.params, "embed": replace(embed, deltas=deltas)})


def gain_plus(step: float) -> Change:
    """Every norm weight plus a number."""

    def shifted(weight: Array) -> Array:
        return weight.astype(np.float64) + step

    def change(setup: Setup) -> Setup:
        norms = _each_layer(setup, lambda layer: {p: {**w, "norm": shifted(w["norm"])} for p, w in layer.items()})
        return norms.but(params={**norms.params, "final_norm": shifted(norms.params["final_norm"])})

    return change


def mlp_weights(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    """Other matrices in every MLP."""
    return lambda setup: _each_layer(setup, lambda layer: {**layer, "mlp": {**layer["mlp"], **change(layer["mlp"])}})


def reshaped(w: Array | Bfloat16Matrix) -> Array | Bfloat16Matrix:
    """Numbers of a (F, D) matrix read as (D, F), then transposed: the right shape, and wrong. w (F, D)."""
    if isinstance(w, Bfloat16Matrix):
        return Bfloat16Matrix(np.ascontiguousarray(w.bits.reshape(w.shape[::-1]).T))
    return np.ascontiguousarray(w.reshape(w.shape[::-1]).T)


def larger_eps(setup: Setup) -> Setup:
    """Ten times the eps of every norm."""
    return setup.but(config=replace(setup.config, rms_norm_eps=10 * setup.config.rms_norm_eps))


def scale_of_assumed_width(setup: Setup) -> Setup | None:
    """Query scale (D / N)**-0.5; shows where that is not H**-0.5."""
    c = setup.config
    scale = (c.hidden_size / c.num_heads) ** -0.5
    return None if scale == c.query_scale else setup.but(config=replace(c, query_scale=scale))


def heads_in_turn(setup: Setup) -> Setup | None:
    """Key head n % K for query head n; shows where 1 < K < N."""
    c = setup.config
    return setup.but(heads="in turn") if 1 < c.num_kv_heads < c.num_heads else None


def _each_layer(setup: Setup, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Setup:
    layers = [change(layer) for layer in cast(list[dict[str, Any]], setup.params["layers"])]
    return setup.but(params=cast(Params, {**setup.params, "layers": layers}))
