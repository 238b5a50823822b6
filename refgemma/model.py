"""The whole transformer on one page.

Tokens become vectors; each layer adds to them what its attention and its MLP compute from their normalised copy; the
last norm and the embedding table turn them into one score for each vocabulary entry. This is all of Gemma 1.

Axes: B batch row, T position in this call, S position among all keys, D residual stream, N query heads, K key/value
heads, H head width, F MLP width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import numpy as np

from refgemma.cache import KVCache
from refgemma.compute.threads import elementwise
from refgemma.config import Config
from refgemma.errors import InputError
from refgemma.numerics import FLOAT32, Array, Numerics, namespace_of, to_host
from refgemma.ops.attention import allowed_keys, attention_mix, attention_probs, attention_scores
from refgemma.ops.embedding import embed
from refgemma.ops.linear import linear, linears
from refgemma.ops.mlp import gelu
from refgemma.ops.norm import rms_norm
from refgemma.ops.rope import rope, rope_table
from refgemma.params import Params

Tap: TypeAlias = Callable[[str, Array], Array]


def identity(name: str, value: Array) -> Array:
    """Default tap: returns every tensor unchanged."""
    return value


def forward(
    params: Params,
    config: Config,
    tokens: Array,
    *,
    positions: Array | None = None,
    cache: KVCache | None = None,
    logits: Literal["all", "last"] = "all",
    numerics: Numerics = FLOAT32,
    tap: Tap = identity,
) -> Array:
    """Score every vocabulary entry as the next token, at every position.

    Parameters
    ----------
    params : Params
        Weights.
    config : Config
        Shape and constants.
    tokens : ndarray of int, shape (B, T)
        Token ids in ``[0, V)``. Like positions, they are taken to where the weights are.
    positions : ndarray of int, shape (B, T), optional
        Absolute positions; -1 marks padding, which is never attended to and whose outputs are zero. By default each row
        counts on from what the cache holds, or from 0.
    cache : KVCache, optional
        Keys and values of what was fed before; grows by T.
    logits : {"all", "last"}
        For every position, or for the last real one of each row (zeros for a row that is all padding).
    numerics : Numerics
        Arithmetic of activations.
    tap : callable
        ``tap(name, value) -> value``, called on every named tensor; what it returns is what the computation goes on
        with. Values lie in memory as is fastest: return a new array rather than write into a reshaped one.

    Returns
    -------
    ndarray, shape (B, T, V) or (B, V)
        Logits, in the dtype of `numerics` and the array library of the weights.

    Raises
    ------
    ValueError
        If tokens or positions have the wrong shape or range, `logits` is unknown, or the cache is full.

    References
    ----------
    Gemma Team, "Gemma: Open Models Based on Gemini Research and Technology", 2024, section 2.
    """
    if logits not in ("all", "last"):
        raise InputError(f"logits is {logits!r}: expected 'all' or 'last'")
    xp = namespace_of(params["final_norm"])  # the weights decide where to compute
    place = to_host if xp is np else xp.asarray
    tokens, positions = map(place, _checked(tokens, positions, cache, config))
    if cache is not None:
        cache.extend(positions)
    key_positions = positions if cache is None else cache.positions[:, : cache.length]
    allowed = allowed_keys(positions, key_positions)  # BTS
    tables = {  # cosines and sines; layers with the same angles share them
        (H, theta): rope_table(positions, H, theta, numerics=numerics)
        for H, theta in {(c.head_dim, c.rope_theta) for c in config.layers}
    }
    norm = partial(rms_norm, eps=config.rms_norm_eps, numerics=numerics)
    project = partial(linear, numerics=numerics)
    B, T = tokens.shape

    x = embed(tokens, params["embed"], numerics=numerics)  # BTD
    x[positions < 0] = 0  # and it stays zero: norms, products and residual adds all map zero to zero
    x = tap("embed", x)

    for i, (layer, c) in enumerate(zip(params["layers"], config.layers, strict=True)):
        # Each position reads from those before it, and adds the result.
        N, K, H, angles = c.num_heads, c.num_kv_heads, c.head_dim, tables[c.head_dim, c.rope_theta]
        attn, at = layer["attn"], f"layers.{i}.attn."
        y = tap(at + "norm", norm(x, attn["norm"]))
        q, k, v = linears(y, (attn["q"], attn["k"], attn["v"]), numerics=numerics)
        q = tap(at + "q", q.reshape(B, T, N, H))
        k = tap(at + "k", k.reshape(B, T, K, H))
        v = tap(at + "v", v.reshape(B, T, K, H))
        q = tap(at + "q_rope", rope(q, *angles, numerics=numerics))
        k = tap(at + "k_rope", rope(k, *angles, numerics=numerics))
        keys, values = (k.swapaxes(1, 2), v.swapaxes(1, 2)) if cache is None else cache.update(i, k, v)  # BKSH
        scores = tap(at + "scores", attention_scores(q, keys, scale=c.query_scale, numerics=numerics))  # BNTS
        probs = tap(at + "probs", attention_probs(scores, allowed, numerics=numerics))
        mix = tap(at + "mix", attention_mix(probs, values, numerics=numerics))  # BTNH
        out = tap(at + "out", project(mix.reshape(B, T, N * H), attn["out"]))
        x = tap(at + "residual", numerics.round("attn.residual", x + out))

        # Each position is then transformed independently, by a wider gated layer, and adds the result.
        mlp, at = layer["mlp"], f"layers.{i}.mlp."
        y = tap(at + "norm", norm(x, mlp["norm"]))
        gate, up = linears(y, (mlp["gate"], mlp["up"]), columns=True, numerics=numerics)
        gate, up = tap(at + "gate", gate), tap(at + "up", up)  # BTF
        act = tap(at + "act", gelu(gate, numerics=numerics))
        gated = tap(at + "gated", numerics.round("mlp.gated", elementwise(np.multiply, act, up)))  # act * up
        down = tap(at + "down", project(gated, mlp["down"]))
        x = tap(f"layers.{i}.out", numerics.round("out", x + down))

    if logits == "last":
        last = T - 1 - (positions[:, ::-1] >= 0).argmax(axis=1)  # B: where each row has its last real token
        x = x[xp.arange(B), last][:, None]  # B1D
    x = tap("final_norm", norm(x, params["final_norm"]))
    every = tap("logits", project(x, params["head"]))  # BTV
    return every[:, 0] if logits == "last" else every


def _checked(tokens: Array, positions: Array | None, cache: KVCache | None, config: Config) -> tuple[Array, Array]:
    """Tokens and positions as integer arrays of one shape (B, T), once they are known to be usable."""
    if tokens.ndim != 2 or not tokens.size:
        raise InputError(f"tokens have shape {tokens.shape}: expected (batch, positions), at least one of each")
    if tokens.dtype.kind not in "iu":
        raise InputError(f"tokens have dtype {tokens.dtype}: expected whole numbers, the token ids")
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= config.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InputError(f"token id {wrong} is outside the vocabulary of {config.vocab_size} (ids from 0)")
    if positions is None:
        xp = namespace_of(tokens)
        count = xp.arange(tokens.shape[1])
        positions = cache.next_positions(tokens.shape[1]) if cache is not None else xp.broadcast_to(count, tokens.shape)
    if positions.shape != tokens.shape or positions.dtype.kind not in "iu":
        raise InputError(
            f"positions are {positions.dtype} of shape {positions.shape}: expected whole numbers, {tokens.shape}"
        )
    if int(positions.min()) < -1:
        raise InputError(f"position {int(positions.min())} is invalid: expected 0 or more, or -1 for padding")
    return tokens, positions
