"""The reference, run as a port with bugs computes: each bug sets fields of a `Setup`, so any two can be combined.

Nothing of the model is written twice. A bug enters through config, params, the rounding points of `numerics`, or the
tap: the tap receives what the reference computed, and returns what the port computes in its place, made by the
functions of `refgemma.ops` from earlier tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, cast

import numpy as np

from refgemma.cache import KVCache
from refgemma.config import Config
from refgemma.generation import CHUNK
from refgemma.model import Tap, forward, identity
from refgemma.numerics import FLOAT64, Array, Numerics, from_bfloat16, to_bfloat16
from refgemma.ops.attention import attention_mix, attention_scores
from refgemma.ops.linear import table_rows
from refgemma.ops.mlp import gelu
from refgemma.ops.norm import rms_norm
from refgemma.ops.rope import rope, rope_table
from refgemma.oracle.operations import split_name
from refgemma.params import LayerParams, Params

Instead: TypeAlias = Callable[[str, Array, slice], Array]

_CACHED = ("attn.k_rope", "attn.v")  # later chunks read these as well


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """What is run, and how: by default as Gemma computes."""

    params: Params  # weights
    config: Config  # shape and constants
    tokens: Array  # BT
    positions: Array  # BT, absolute; -1 for padding
    numerics: Numerics = FLOAT64  # arithmetic of activations
    embedding: Literal["scaled", "bare", "scaled twice"] = "scaled"  # rows of the table, by sqrt(D)
    head_scaled: bool = False  # whether sqrt(D) multiplies the logits as well
    # each norm before its block, or after the residual add; or the second one on attention's output
    norms: Literal["before", "after", "as in Gemma 2"] = "before"
    eps_outside: bool = False  # whether eps is added to the root instead of inside it
    squares: Literal["wide", "bfloat16"] = "wide"  # format of a norm's input, its squares and their mean
    rope_positions: Array | None = None  # BT, from which rotary angles are formed; None for `positions`
    lanes: Literal["halves", "neighbours"] = "halves"  # lane i is paired with lane i + H/2, or 2i with 2i + 1
    heads: Literal["grouped", "in turn"] = "grouped"  # query head n reads key head n // G, or n % K
    fresh_keys: Literal["rounded", "wide"] = "rounded"  # keys of this call are read after rounding, or before
    activation: Literal["tanh", "erf", "silu"] = "tanh"  # GELU in either form, or SiLU
    activated: Literal["gate", "up"] = "gate"  # which of the two goes through it

    @property
    def odd_norm(self) -> bool:
        """Whether the root of a norm is computed otherwise."""
        return self.eps_outside or self.squares != "wide"

    def but(self, **fields: Any) -> Setup:
        """The same setup with some fields changed."""
        return replace(self, **fields)


@dataclass
class Chunks:
    """Which positions a run in chunks is at: a new chunk begins with its embedding."""

    now: slice = field(default_factory=lambda: slice(0, 0))  # of the T positions

    def at(self, name: str, value: Array) -> slice:
        """The positions that a tensor of the tap is of."""
        if name == "embed":
            self.now = slice(self.now.stop, self.now.stop + value.shape[1])
        return self.now


def run(setup: Setup, tap: Tap = identity) -> Array:
    """Run the reference as a setup says; logits BTV."""
    B, T = setup.tokens.shape
    cache = KVCache(setup.config, batch=B, capacity=T, dtype=setup.numerics.dtype)
    ported = port_tap(setup, tap)
    logits = []
    for start in range(0, T, CHUNK):
        chunk = slice(start, start + CHUNK)
        logits.append(
            forward(
                setup.params,
                setup.config,
                setup.tokens[:, chunk],
                positions=setup.positions[:, chunk],
                cache=cache,
                numerics=setup.numerics,
                tap=ported,
            )
        )
    return np.concatenate(logits, axis=1)


def port_tap(setup: Setup, tap: Tap = identity, *, instead: Instead | None = None) -> Tap:
    """Tap that makes the reference compute as a setup says; `instead` gives what later operations read."""
    seen: dict[str, Array] = {}  # by step, of this layer and chunk; "stream" is what enters it
    keys: dict[tuple[int, str], list[Array]] = {}  # of all chunks
    chunks = Chunks()

    def tap_port(name: str, value: Array) -> Array:
        i, step = split_name(name)
        chunk = chunks.at(name, value)
        value = _as_in_the_port(setup, i, step, value, seen, chunk).astype(value.dtype, copy=False)
        value = tap(name, value)
        read = value if instead is None else instead(name, value, chunk)
        if step in ("embed", "out"):
            seen.clear()
            seen["stream"] = read
            return value
        seen[step] = read
        if i is not None and step in _CACHED:
            past = keys.setdefault((i, step), [])
            past.append(read)
            seen["every " + step] = np.concatenate(past, axis=1)  # BSKH
        return value

    return tap_port


def _as_in_the_port(
    setup: Setup, i: int | None, step: str, value: Array, seen: dict[str, Array], chunk: slice
) -> Array:
    """One tensor as the port computes it; `value` itself where no bug touches it."""
    if step == "embed":
        return _embedding(setup, value, chunk)
    if step == "logits":
        return value * math.sqrt(setup.config.hidden_size) if setup.head_scaled else value
    if step == "final_norm":
        return _norm(setup, seen["stream"], setup.params["final_norm"]) if setup.odd_norm else value
    assert i is not None
    layer = setup.params["layers"][i]
    if step in ("attn.norm", "attn.residual", "mlp.norm", "out"):
        return _norms(setup, layer, step, value, seen)
    if step in ("attn.q_rope", "attn.k_rope"):
        odd = setup.rope_positions is not None or setup.lanes == "neighbours"
        return _rotated(setup, i, seen[step.removesuffix("_rope")], setup.numerics, chunk) if odd else value
    if step in ("attn.scores", "attn.mix"):
        return _heads(setup, i, step, value, seen, chunk)
    if step in ("mlp.act", "mlp.gated"):
        return _gate(setup, step, value, seen)
    return value


def _embedding(setup: Setup, value: Array, chunk: slice) -> Array:
    if setup.embedding == "bare":
        rows = table_rows(setup.tokens[:, chunk], setup.params["embed"], setup.numerics)
        rows[setup.positions[:, chunk] < 0] = 0
        return rows
    if setup.embedding == "scaled twice":
        scale = setup.numerics.round("embed.scale", math.sqrt(setup.config.hidden_size))
        return setup.numerics.round("embed", value * scale)
    return value


def _norm(setup: Setup, x: Array, weight: Array) -> Array:
    """The norm; another root is a factor on each vector."""
    eps, wide = setup.config.rms_norm_eps, setup.numerics
    narrow = setup.squares == "bfloat16" and "norm.square" in wide.rounding  # else the bounds allow for the rounding
    if narrow:
        wide = wide.without("norm.square", "norm.mean")
    y = rms_norm(x, weight, eps=eps, numerics=wide)
    if not setup.odd_norm:
        return y
    exact = mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    if narrow:
        mean_square = _narrow(np.mean(_narrow(np.square(_narrow(x))), axis=-1, keepdims=True))
    root = np.sqrt(mean_square) + eps if setup.eps_outside else np.sqrt(mean_square + eps)
    scaled: Array = y * (np.sqrt(exact + eps) / root)
    return scaled


def _narrow(x: Array) -> Array:
    return from_bfloat16(to_bfloat16(x.astype(np.float32))).astype(np.float64)


def _norms(setup: Setup, layer: LayerParams, step: str, value: Array, seen: dict[str, Array]) -> Array:
    """Norms and residual adds of a layer."""
    attn, mlp = layer["attn"]["norm"], layer["mlp"]["norm"]
    x = seen["stream"] if step.startswith("attn") else seen["attn.residual"]
    if step == "attn.norm":
        if setup.norms == "after":
            return x
        return _norm(setup, x, attn) if setup.odd_norm else value
    if step == "mlp.norm":
        if setup.norms != "before":
            return x
        return _norm(setup, x, mlp) if setup.odd_norm else value
    if setup.norms == "after":
        return _norm(setup, value, attn if step == "attn.residual" else mlp)
    if setup.norms == "as in Gemma 2" and step == "attn.residual":
        return setup.numerics.round(step, x + _norm(setup, seen["attn.out"], mlp))
    return value


def _rotated(setup: Setup, i: int, x: Array, numerics: Numerics, chunk: slice) -> Array:
    """Queries or keys, rotated by their angles."""
    positions = setup.positions if setup.rope_positions is None else setup.rope_positions
    c = setup.config.layers[i]
    angles = rope_table(positions[:, chunk], c.head_dim, c.rope_theta, numerics=numerics)
    if setup.lanes == "halves":
        return rope(x, *angles, numerics=numerics)
    # Even lanes go into the first half, odd ones into the second, and back afterwards.
    H = x.shape[-1]
    rotated = rope(np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1), *angles, numerics=numerics)
    return rotated.reshape(*x.shape[:-1], 2, H // 2).swapaxes(-1, -2).reshape(x.shape)


def _heads(setup: Setup, i: int, step: str, value: Array, seen: dict[str, Array], chunk: slice) -> Array:
    """Scores and mixes where another key head is read, or keys are not yet rounded."""
    c, numerics = setup.config.layers[i], setup.numerics
    wide = setup.fresh_keys == "wide" and step == "attn.scores"
    if setup.heads == "grouped" and not wide:
        return value
    # Head m of the reference reads m // G. Head n of the port reads n % K: it takes the (n // K)-th place of that
    # group.
    N, K = c.num_heads, c.num_kv_heads
    heads = np.arange(N)
    place = heads if setup.heads == "grouped" else (heads % K) * (N // K) + heads // K
    at_place = np.argsort(place)
    if step == "attn.mix":
        mixed = attention_mix(seen["attn.probs"][:, at_place], seen["every attn.v"].swapaxes(1, 2), numerics=numerics)
        return mixed[:, :, place]
    keys = seen["every attn.k_rope"]
    if wide:  # keys of this call; the cache holds rounded ones
        as_computed = {point: narrow for point, narrow in numerics.rounding.items() if narrow == "float32"}
        fresh = _rotated(setup, i, seen["attn.k"], replace(numerics, rounding=as_computed), chunk)
        keys = np.concatenate([keys[:, : chunk.start], fresh], axis=1)
    q = seen["attn.q_rope"][:, :, at_place]
    return attention_scores(q, keys.swapaxes(1, 2), scale=c.query_scale, numerics=numerics)[:, place]


def _gate(setup: Setup, step: str, value: Array, seen: dict[str, Array]) -> Array:
    """The activation and the product after it."""
    if setup.activated == "gate" and (setup.activation == "tanh" or step == "mlp.gated"):
        return value
    other = "mlp.gate" if setup.activated == "up" else "mlp.up"
    if step == "mlp.gated":
        return setup.numerics.round(step, seen["mlp.act"] * seen[other])
    x = seen["mlp.up" if setup.activated == "up" else "mlp.gate"]
    if setup.activation == "erf":
        return setup.numerics.round(step, x * 0.5 * (1 + cast(Array, _erf(x / math.sqrt(2)))))
    if setup.activation == "silu":
        return setup.numerics.round(step, x / (1 + np.exp(-x)))
    return gelu(x, numerics=setup.numerics)


_erf = np.vectorize(math.erf, otypes=[np.float64])
