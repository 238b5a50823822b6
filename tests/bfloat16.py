"""Where three engines round in bfloat16, by hand: what each named tensor may be, given the tensors it is made from.

Written in float64 from the engines' sources, not from `refgemma`, one function an operation. A float32 step whose order
or implementation is the engine's own business gets slack by its number of roundings; where that straddles a midpoint,
either neighbour is right. So each answer is an interval of bfloat16 numbers, nearly always of one.

References
----------
See `refgemma.profiles`.
"""

import math

import numpy as np

from tests.models import Model, map_params, random_model

UNIT = 2.0**-24  # one rounding in float32, relatively


def nearest(x):
    """Nearest number with 8 significant bits, ties to even."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)


def single(x):
    """Nearest float32 number, in float64."""
    return np.asarray(x, np.float64).astype(np.float32).astype(np.float64)


def within(value, slack):
    """Lowest and highest bfloat16 number that `value`, known up to `slack`, may be rounded to."""
    return nearest(value - slack), nearest(value + slack)


def narrow_params(params):
    """The same parameters as a checkpoint in bfloat16 holds them, in float32 arrays."""
    return map_params(lambda w: nearest(w).astype(np.float32), params)


def narrow_example(seed, rows=2, **fixed):
    """Random model as a bfloat16 checkpoint holds it, and unpadded rows for it, from position 0 and from 1000."""
    model = random_model(seed, num_tokens=24, **fixed)
    rng = np.random.default_rng([1, seed])
    tokens = rng.integers(0, model.config.vocab_size, size=(rows, 24))
    positions = np.arange(24) + np.where(np.arange(rows) % 2, 1000, 0)[:, None]
    return Model(seed, model.config, narrow_params(model.params), tokens, positions)


def allowed(engine, name, seen, params, config, tokens, positions):
    """Lowest and highest value of one named tensor of an engine, given all that it computed before, ``seen[name]``."""
    seen = {key: value.astype(np.float64) for key, value in seen.items()}
    wide = map_params(lambda w: w.astype(np.float64), params)
    norm, turn, scores, probs, act = ENGINES[engine]
    c, (B, T) = config, tokens.shape
    if name == "embed":
        scaled = nearest(wide["embed"][tokens] * nearest(math.sqrt(c.hidden_size)))
        return scaled, scaled
    last = f"layers.{c.num_layers - 1}.out"
    if name == "final_norm":
        return norm(seen[last], wide["final_norm"], c.rms_norm_eps)
    if name == "logits":
        return dot(seen["final_norm"], wide["head"])
    _, i, step = name.split(".", 2)
    layer, at = wide["layers"][int(i)], f"layers.{i}."
    stream = seen["embed" if i == "0" else f"layers.{int(i) - 1}.out"]
    here = {key.removeprefix(at): value for key, value in seen.items() if key.startswith(at)}
    attn, mlp, H = layer["attn"], layer["mlp"], c.layers[0].head_dim
    G = c.layers[0].num_heads // c.layers[0].num_kv_heads
    if step in ("attn.q", "attn.k", "attn.v"):
        return tuple(x.reshape(B, T, -1, H) for x in dot(here["attn.norm"], attn[step[-1]]))
    by_step = {
        "attn.norm": lambda: norm(stream, attn["norm"], c.rms_norm_eps),
        "attn.q_rope": lambda: turn(here["attn.q"], positions, c.layers[0].rope_theta),
        "attn.k_rope": lambda: turn(here["attn.k"], positions, c.layers[0].rope_theta),
        "attn.scores": lambda: scores(
            here["attn.q_rope"].swapaxes(1, 2),
            np.repeat(here["attn.k_rope"], G, axis=2).swapaxes(1, 2),
            c.layers[0].query_scale,
        ),
        "attn.probs": lambda: probs(np.where(causal(T), here["attn.scores"], -np.inf)),
        "attn.mix": lambda: tuple(
            x.swapaxes(1, 2)
            for x in dot(here["attn.probs"], np.repeat(here["attn.v"], G, axis=2).transpose(0, 2, 3, 1))
        ),
        "attn.out": lambda: dot(here["attn.mix"].reshape(B, T, -1), attn["out"]),
        "attn.residual": lambda: add(stream, here["attn.out"]),
        "mlp.norm": lambda: norm(here["attn.residual"], mlp["norm"], c.rms_norm_eps),
        "mlp.gate": lambda: dot(here["mlp.norm"], mlp["gate"]),
        "mlp.up": lambda: dot(here["mlp.norm"], mlp["up"]),
        "mlp.act": lambda: act(here["mlp.gate"]),
        "mlp.gated": lambda: within(here["mlp.act"] * here["mlp.up"], 0),  # 16 bits: exact in float32
        "mlp.down": lambda: dot(here["mlp.gated"], mlp["down"]),
        "out": lambda: add(here["attn.residual"], here["mlp.down"]),
    }
    return by_step[step]()


def causal(T):
    """Which of T keys each of T queries sees."""
    return np.tril(np.ones((T, T), bool))


# ---- steps that all engines take alike


def dot(x, w):
    """Sum of exact products in float32, in any order, rounded once: n roundings of at most the sum of magnitudes."""
    exact, magnitude = x @ w.swapaxes(-1, -2), np.abs(x) @ np.abs(w).swapaxes(-1, -2)
    return within(exact, x.shape[-1] * UNIT * magnitude)


def add(x, y):
    """One sum in float32, rounded once more: no choice in that."""
    return within(single(x + y), 0)


def table(angle):
    """Cosine and sine of a float32 angle, good to one unit in the last place; (..., H/2) for every head."""
    cos, sin = (f(angle)[:, :, None] for f in (np.cos, np.sin))
    return cos, sin, 2 * UNIT * np.abs(cos), 2 * UNIT * np.abs(sin)


def timescales(H, theta):
    """``theta ** (2 i / H)``, exponent and power rounded to float32."""
    return single(theta ** single(np.arange(0, H, 2) / H))


# ---- torch: transformers, gemma_pytorch


def norm_in_float32(x, weight, eps):
    # D squares and additions under a root, then root, inverse, gain and two products: at most D / 2 + 6 half-ulps.
    exact = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * (1 + weight)
    return within(exact, (x.shape[-1] / 2 + 6) * UNIT * np.abs(exact))


def probs_in_float32(scores):
    # S exponentials, each off by a unit in the last place and by the rounding of its argument, summed; one division.
    weights = np.exp(shifted := scores - scores.max(axis=-1, keepdims=True))
    exact = weights / weights.sum(axis=-1, keepdims=True)
    deepest = np.abs(shifted, where=np.isfinite(shifted), out=np.zeros_like(shifted)).max()
    return within(exact, (scores.shape[-1] + 4 + 2 * deepest) * UNIT * exact)


def gelu_in_float32(x):
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    tanh = np.tanh(inner)
    # Six roundings on the way to the tangent, whose slope passes them on; the tangent itself to one unit in the last
    # place, which is all that is left of one plus the tangent far on the negative side.
    slack = 6 * UNIT * np.abs(inner) * (1 - tanh**2) + 2 * UNIT
    exact = 0.5 * x * (1 + tanh)
    return within(exact, 0.5 * np.abs(x) * slack + 3 * UNIT * np.abs(exact))


def frequency_angle(H, positions, theta):
    return single(positions[..., None] * single(1 / timescales(H, theta)))


def turn_by_rounded_table(x, positions, theta):
    """Transformers: the table in bfloat16, each product rounded, then their sum."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin, cos_slack, sin_slack = table(frequency_angle(x.shape[-1], positions, theta))
    either = [
        np.concatenate(
            [nearest(nearest(first * c) - nearest(second * s)), nearest(nearest(second * c) + nearest(first * s))], -1
        )
        for c in within(cos, cos_slack)
        for s in within(sin, sin_slack)
    ]
    return np.min(either, axis=0), np.max(either, axis=0)


def turn_in_float32(x, cos, sin, cos_slack, sin_slack):
    """Table, products and sum in float32, rounded once at the end."""
    first, second = np.split(x, 2, axis=-1)
    exact = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    sizes = [
        np.abs(a) * (s + 2 * UNIT * np.abs(t)) for t, s in ((cos, cos_slack), (sin, sin_slack)) for a in (first, second)
    ]
    return within(exact, np.concatenate([sizes[0] + sizes[3], sizes[1] + sizes[2]], axis=-1))


def turn_by_frequency(x, positions, theta):
    """gemma_pytorch: a complex product in float32."""
    return turn_in_float32(x, *table(frequency_angle(x.shape[-1], positions, theta)))


def scores_scaled_after(q, k, scale):
    """Transformers: the product rounded, then times the scale."""
    return tuple(nearest(single(bound * single(scale))) for bound in dot(q, k))


def scores_of_scaled_query(q, k, scale):
    """gemma_pytorch: the query times the scale, which stays exact, rounded."""
    return dot(nearest(single(q * single(scale))), k)


# ---- JAX: every operation rounds to bfloat16, constants included


def norm_by_steps(x, weight, eps):
    squares = nearest(x**2)
    mean = squares.mean(axis=-1, keepdims=True)
    either = []
    for bound in within(mean, x.shape[-1] * UNIT * mean):
        inverse = 1 / np.sqrt(nearest(bound + nearest(eps)))
        for narrow in within(inverse, 2 * UNIT * inverse):
            either.append(nearest(nearest(x * narrow) * nearest(1 + weight)))
    return np.min(either, axis=0), np.max(either, axis=0)


def turn_by_timescale(x, positions, theta):
    return turn_in_float32(x, *table(single(positions[..., None] / timescales(x.shape[-1], theta))))


def scores_of_narrow_scale(q, k, scale):
    return dot(nearest(q * nearest(scale)), k)


def probs_by_steps(scores):
    weights = np.exp(nearest(scores - scores.max(axis=-1, keepdims=True)))
    low, high = within(weights, 2 * UNIT * weights)
    sums = [
        nearest(w.sum(axis=-1, keepdims=True) * (1 + sign * scores.shape[-1] * UNIT))
        for w, sign in ((low, -1), (high, 1))
    ]
    return nearest(low / sums[1] * (1 - UNIT)), nearest(high / sums[0] * (1 + UNIT))


def gelu_by_steps(x):
    cube = nearest(nearest(x * x) * x)
    inner = nearest(nearest(math.sqrt(2 / math.pi)) * nearest(x + nearest(nearest(0.044715) * cube)))
    tanh = np.tanh(inner)
    ends = [nearest(x * 0.5 * nearest(1 + narrow)) for narrow in within(tanh, 2 * UNIT * np.abs(tanh))]
    return np.minimum(*ends), np.maximum(*ends)


ENGINES = {
    "bf16-transformers": (
        norm_in_float32,
        turn_by_rounded_table,
        scores_scaled_after,
        probs_in_float32,
        gelu_in_float32,
    ),
    "bf16-deepmind": (norm_by_steps, turn_by_timescale, scores_of_narrow_scale, probs_by_steps, gelu_by_steps),
    "bf16-gemma-pytorch": (
        norm_in_float32,
        turn_by_frequency,
        scores_of_scaled_query,
        probs_in_float32,
        gelu_in_float32,
    ),
}
