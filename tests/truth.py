"""Gemma 1 in float64, by hand: the answer that every faster computation is judged by.

One row at a time without its padding, one head and one query at a time over the keys it may see: no batch, no mask, no
cache. Written from the formulas, not from `refgemma`. Each known bug of Gemma ports is a switch, so that a test can
plant it here and see that its comparison notices.

For each layer, with x the residual stream::

    x += out( concat_n softmax_s( q_n[t] . k_{n // G}[s] * query_scale ) v_{n // G}[s] )     from norm(x), s not after t
    x += down( gelu_tanh(gate x') * (up x') )                                              with x' = norm(x)

    norm(x) = x / sqrt(mean(x^2) + eps) * (1 + w);   logits = head norm(x);   x starts as sqrt(D) embed[token]

References
----------
Gemma Team, "Gemma: Open Models based on Gemini Research and Technology", 2024, section 2; Su et al., "RoFormer", 2021,
section 3.2 (lanes i and i + H/2 turn together here); Shazeer, "GLU Variants Improve Transformer", 2020 (GEGLU);
Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2 (tanh form); google-deepmind/gemma at 54718dcd8.
"""

import math

import numpy as np

# Names as in the project's catalogue of known bugs: those that float32 shows. What the right model does, done wrong.
BUGS = {
    "A1": "no factor sqrt(D) on the embedding",
    "A3": "sqrt(D) baked into the tied table, so the head has it, too",
    "A4": "sqrt(D) applied twice",
    "A5": "the low-rank delta of the embedding is not scaled by sqrt(D)",
    "B1": "norm gain w instead of 1 + w",
    "B2": "norm gain 2 + w: the one added twice",
    "B8": "norm after the residual add instead of before attention and MLP",
    "B9": "eps added outside the root of the norm",
    "B9 1e-5": "eps ten times too large",
    "C1": "GELU by erf instead of tanh",
    "C2": "SiLU instead of GELU",
    "C3": "gate and up swapped",
    "C3 reshaped": "gate matrix reshaped where it should be transposed",
    "D2": "positions rounded to bfloat16",
    "D7": "rotary lanes 2i and 2i + 1 paired instead of i and i + H/2",
    "D9": "last token of a padded row takes its column as position",
    "E2": "query scale (D/N)**-0.5: head width assumed to be D/N",
    "E6": "query head n reads key head n % K instead of n // G",
}


def truth_logits(params, config, tokens, positions=None, *, bugs=frozenset(), embed_delta=None):
    """Logits (B, T, V) in float64; zeros where `positions` (B, T) is -1.

    `embed_delta` (V, D) is what an adapter adds to the embedding table, and not to the head.
    """
    if unknown := set(bugs) - set(BUGS):
        raise ValueError(f"no such bug: {sorted(unknown)}")
    tokens = np.asarray(tokens)
    B, T = tokens.shape
    positions = np.tile(np.arange(T), (B, 1)) if positions is None else np.asarray(positions)
    logits = np.zeros((B, T, config.vocab_size))
    for b in range(B):
        real = positions[b] >= 0
        if not real.any():
            continue
        row_positions = positions[b, real]
        if "D9" in bugs:
            row_positions[-1] += np.count_nonzero(~real)
        named = truth_row(params, config, tokens[b, real], row_positions, bugs=bugs, embed_delta=embed_delta)
        logits[b, real] = named["logits"]
    return logits


def truth_row(params, config, tokens, positions, *, bugs=frozenset(), embed_delta=None):
    """Every named tensor of one unpadded row, as in `refgemma.model.forward`'s tap but without the batch axis."""
    D, N, K, H = (
        config.hidden_size,
        config.layers[0].num_heads,
        config.layers[0].num_kv_heads,
        config.layers[0].head_dim,
    )
    T = len(tokens)
    named = {}

    query_scale = (D / N) ** -0.5 if "E2" in bugs else config.layers[0].query_scale
    kv_head = [n % K if "E6" in bugs else n // (N // K) for n in range(N)]
    turned_by = [bfloat16(p) if "D2" in bugs else int(p) for p in positions]
    seen_from = [np.flatnonzero(positions <= positions[t]) for t in range(T)]  # itself, and what came before

    embed_scale = 1.0 if "A1" in bugs else float(D) if "A4" in bugs else math.sqrt(D)
    delta_scale = 1.0 if "A5" in bugs else embed_scale
    x = np.array([embed_scale * wide(params["embed"])[token] for token in tokens])  # TD
    if embed_delta is not None:
        x += np.array([delta_scale * wide(embed_delta)[token] for token in tokens])
    named["embed"] = x

    for i, layer in enumerate(params["layers"]):
        attn = {name: wide(value) for name, value in layer["attn"].items()}
        mlp = {name: wide(value) for name, value in layer["mlp"].items()}

        h = x if "B8" in bugs else norm(x, attn["norm"], config.rms_norm_eps, bugs)
        q = (h @ attn["q"].T).reshape(T, N, H)
        k = (h @ attn["k"].T).reshape(T, K, H)
        v = (h @ attn["v"].T).reshape(T, K, H)
        q_rope = np.array([turn(q[t], turned_by[t], config.layers[0].rope_theta, bugs) for t in range(T)])
        k_rope = np.array([turn(k[t], turned_by[t], config.layers[0].rope_theta, bugs) for t in range(T)])

        scores, probs, mix = np.empty((N, T, T)), np.zeros((N, T, T)), np.empty((T, N, H))
        for n in range(N):
            keys, values = k_rope[:, kv_head[n]], v[:, kv_head[n]]  # SH
            for t in range(T):
                scores[n, t] = keys @ q_rope[t, n] * query_scale
                seen = seen_from[t]
                probs[n, t, seen] = softmax(scores[n, t, seen])
                mix[t, n] = probs[n, t, seen] @ values[seen]
        out = mix.reshape(T, N * H) @ attn["out"].T
        residual = x + out
        if "B8" in bugs:
            residual = norm(residual, attn["norm"], config.rms_norm_eps, bugs)

        m = residual if "B8" in bugs else norm(residual, mlp["norm"], config.rms_norm_eps, bugs)
        w_gate = mlp["gate"].reshape(D, -1).T if "C3 reshaped" in bugs else mlp["gate"]
        gate, up = m @ w_gate.T, m @ mlp["up"].T
        if "C3" in bugs:
            gate, up = up, gate
        act = activation(gate, bugs)
        down = (act * up) @ mlp["down"].T
        x = residual + down
        if "B8" in bugs:
            x = norm(x, mlp["norm"], config.rms_norm_eps, bugs)

        block = {
            "attn.norm": h,
            "attn.q": q,
            "attn.k": k,
            "attn.v": v,
            "attn.q_rope": q_rope,
            "attn.k_rope": k_rope,
            "attn.scores": scores,
            "attn.probs": probs,
            "attn.mix": mix,
            "attn.out": out,
            "attn.residual": residual,
            "mlp.norm": m,
            "mlp.gate": gate,
            "mlp.up": up,
            "mlp.act": act,
            "mlp.gated": act * up,
            "mlp.down": down,
            "out": x,
        }
        named |= {f"layers.{i}.{name}": value for name, value in block.items()}

    named["final_norm"] = norm(x, wide(params["final_norm"]), config.rms_norm_eps, bugs)
    named["logits"] = named["final_norm"] @ wide(params["head"]).T * (math.sqrt(D) if "A3" in bugs else 1.0)
    return named


def wide(array):
    """The same numbers in float64."""
    return np.asarray(array, dtype=np.float64)


def norm(x, weight, eps, bugs=frozenset()):
    """RMS norm of each vector, with the gain 1 + w of Gemma."""
    mean_square = np.mean(x**2, axis=-1, keepdims=True)
    if "B9 1e-5" in bugs:
        eps = 10 * eps
    rms = np.sqrt(mean_square) + eps if "B9" in bugs else np.sqrt(mean_square + eps)
    one = 0.0 if "B1" in bugs else 2.0 if "B2" in bugs else 1.0
    return x / rms * (one + weight)


def turn(heads, position, theta, bugs=frozenset()):
    """Rotary embedding of all heads (N, H) of one token: pair i turns by position * theta ** (-2i / H)."""
    H = heads.shape[-1]
    i = np.arange(H // 2)
    first, second = (2 * i, 2 * i + 1) if "D7" in bugs else (i, i + H // 2)
    angle = position * theta ** (-2.0 * i / H)
    turned = np.empty_like(heads)
    turned[:, first] = heads[:, first] * np.cos(angle) - heads[:, second] * np.sin(angle)
    turned[:, second] = heads[:, second] * np.cos(angle) + heads[:, first] * np.sin(angle)
    return turned


def softmax(scores):
    """Exponentials that sum to one; the shift by the maximum cancels and keeps them finite."""
    weights = np.exp(scores - np.max(scores))
    return weights / np.sum(weights)


def activation(x, bugs=frozenset()):
    """GELU, tanh form."""
    if "C1" in bugs:
        return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))
    if "C2" in bugs:
        return x / (1.0 + np.exp(-x))
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def bfloat16(number):
    """Nearest number with 8 significant bits, ties to even."""
    mantissa, exponent = math.frexp(float(number))
    return math.ldexp(round(mantissa * 256), exponent - 8)
