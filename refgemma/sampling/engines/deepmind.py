"""google-deepmind/gemma: one sampling method at a time, top-k or top-p; top-p keeps all that tie with its last.

All is computed in the format of the logits, from the temperature to the running sums of top-p. Half precision shows:
temperature and p are rounded themselves, quotients tie, and the running sum of a long tail ends well below or above 1.
How JAX splits an operation into roundings is imitated as on a CPU, one operation after the other; where it compiles
several into one, it may leave out a rounding to bfloat16 between them. The noise that it adds to draw a token is in the
same format, and no part of the distribution.
"""

from __future__ import annotations

import functools

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps as shared
from refgemma.sampling.decision import Step
from refgemma.sampling.engines.engine import Context, Engine
from refgemma.sampling.engines.parts import Refused, is_on, refuse, rounded
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps.selection import exp_below

NAME = "google-deepmind/gemma"
_BLOCK = 16


def steps(params: SamplingParams, context: Context) -> list[Step]:
    """Steps that these settings switch on."""
    refuse(NAME, params, "repetition_penalty", "frequency_penalty", "presence_penalty", "penalty_window")
    refuse(NAME, params, "logit_bias", "min_p", "typical_p")
    if params.temperature == 0:
        raise Refused(f"{NAME} divides by temperature 0: its greedy choice is the method Greedy, not a temperature")
    if is_on(params, "top_k") and is_on(params, "top_p"):
        raise Refused(f"{NAME} cannot combine top_k and top_p: TopkSampling and TopPSampling are two methods")
    if params.top_k is not None and params.top_k > context.V:
        raise Refused(
            f"{NAME} refuses top_k {params.top_k}: there are {context.V} tokens, and jax.lax.top_k takes no more"
        )
    bind = functools.partial
    chosen: list[Step] = []
    if is_on(params, "banned"):
        chosen.append(("banned", bind(shared.banned, tokens=tuple(params.banned))))
    if params.top_k is not None:
        chosen.append(("top_k", bind(shared.top_k, k=params.top_k)))
    if is_on(params, "temperature"):
        chosen.append(("temperature", bind(temperature, value=params.temperature, dtype=context.logits_dtype)))
    if params.top_p is not None and params.top_p < 1:
        chosen.append(("top_p", bind(top_p_and_ties, p=params.top_p, dtype=context.logits_dtype)))
    return chosen


def temperature(logits: Array, value: float, dtype: str) -> Array:
    """Divide the logits by the temperature, which is rounded to the format of the logits first.

    `RandomSampling` and the others, google-deepmind/gemma at 7691fd4e, ``gemma/gm/text/_sampling.py``; a Python number
    takes the format of the array that it meets: JAX documentation, "Type promotion semantics".

    logits (V,).
    """
    return divided(logits, rounded(np.array(value, np.float32), dtype), dtype)


def top_p_and_ties(logits: Array, p: float, dtype: str) -> Array:
    """Keep the most likely tokens until their mass is at least p, and all whose logit ties with the last of them.

    `TopPSampling`, google-deepmind/gemma at 7691fd4e, ``gemma/gm/text/_sampling.py``.

    logits (V,).
    """
    descending = np.sort(logits)[::-1]
    mass = running_sums(probabilities(descending, dtype), dtype)
    # Where the sums end below p the index runs past the last token, where JAX reads NaN: nothing is removed.
    border = min(int(np.count_nonzero(mass < rounded(np.array(p, np.float32), dtype))), len(logits) - 1)
    return np.where(logits < descending[border], -np.inf, logits)


def probabilities(logits: Array, dtype: str) -> Array:
    """Softmax whose every operation is rounded to a format, but for its sum, which is rounded at the end.

    `jax.nn.softmax` and `jax.numpy.sum`, JAX 0.10.

    logits (V,).
    """
    weights = rounded(exp_below(rounded(logits - logits.max(), dtype)), dtype)
    return divided(weights, rounded(weights.sum(), dtype), dtype)


def divided(x: Array, by: Array, dtype: str) -> Array:
    """Divide by one number, the way XLA does: multiply by its reciprocal.

    The reciprocal is a float16 in float16, but a float32 in bfloat16, in which XLA does not compute: it widens, and
    rounds the result alone. Read from what JAX 0.10 compiles for a CPU, and held against it in ``tests/peers``.

    by ().
    """
    reciprocal = np.float32(1) / by
    return rounded(x * (rounded(reciprocal, dtype) if dtype == "float16" else reciprocal), dtype)


def running_sums(x: Array, dtype: str) -> Array:
    """Running sums with each addition rounded, in the order of XLA: in blocks of 16, and over the blocks again so.

    A plain running sum in bfloat16 would stand still from the point where a probability is less than 1/512 of it. Read
    from what JAX 0.10 compiles for a CPU, and held against it in ``tests/peers``.

    x (n,).
    """
    rows = -(-len(x) // _BLOCK)
    sums = np.pad(x, (0, rows * _BLOCK - len(x))).reshape(rows, _BLOCK)
    for i in range(1, _BLOCK):
        sums[:, i] = rounded(sums[:, i - 1] + sums[:, i], dtype)
    if rows > 1:
        sums[1:] = rounded(sums[1:] + running_sums(sums[:, -1], dtype)[:-1, None], dtype)
    return np.asarray(sums.reshape(-1)[: len(x)])


ENGINE = Engine(NAME, "google-deepmind/gemma at 7691fd4e: gemma/gm/text/_sampling.py, _sampler_loop.py", steps)
