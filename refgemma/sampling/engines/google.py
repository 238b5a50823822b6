"""Google's own four: gemma_pytorch, google-deepmind/gemma, KerasHub and gemma.cpp.

gemma_pytorch: top-p on the full distribution, keeping one token more at equality, then top-k by rank. The quotient by
the temperature is kept in the format of the logits, which in half precision creates ties; from its softmax on the
engine computes in float32.

google-deepmind/gemma: one sampling method at a time, top-k or top-p; top-p keeps all that tie with its last. All is
computed in the format of the logits, from the temperature to the running sums of top-p. Half precision shows:
temperature and p are rounded themselves, quotients tie, and the running sum of a long tail ends well below or above 1.
JAX's roundings are imitated as on a CPU, one operation after the other; where it compiles several into one, it may
leave out a rounding to bfloat16 between them. The noise that it adds to draw a token is in the same format, and not
part of the distribution.

KerasHub: top-k, then top-p of the probabilities as they were before top-k, keeping one token more at equality.

gemma.cpp: exactly k tokens and their softmax; a temperature that, in this version, has no effect.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps
from refgemma.sampling.decision import Step
from refgemma.sampling.engines.engine import Context, Engine, engine_of, is_on, refuse, rounded, softmax, steps_in
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps import exp_below, only

# ---- gemma_pytorch


def temperature_in_place(logits: Array, value: float, dtype: str) -> Array:
    """Divide the logits by the temperature, and put the quotients in their place, in the format of the logits.

    `Sampler.forward`, google/gemma_pytorch at 014acb7a, ``gemma/model.py``: ``logits.div_(temperatures)``. PyTorch
    computes with two formats in the wider one, and writes the result in that of the tensor that it is put into.
    """
    return rounded(steps.temperature(logits, value), dtype)


def top_p_not_beyond(probs: Array, p: float) -> Array:
    """Keep a token as long as the mass of the more likely ones is not above p, so one more at equality.

    The mass before a token is the running sum less its own probability, which is where it may differ in the last bit
    from the running sum of the tokens before it. Running sums are rounded to float32 one by one, as torch does on the
    CPU.

    `Sampler.forward`, google/gemma_pytorch at 014acb7a, ``gemma/model.py``.
    """
    descending = np.argsort(-probs, kind="stable")
    own = np.maximum(probs[descending], 0)
    before = np.cumsum(own, dtype=np.float64).astype(np.float32) - own
    left = probs[descending] > -np.inf
    return only(probs, descending[left & (before <= np.float32(p))])


GEMMA_PYTORCH = engine_of(
    "gemma_pytorch",
    "google/gemma_pytorch at 014acb7a: gemma/model.py, Sampler",
    {
        "temperature": temperature_in_place,  # None there for a greedy choice
        "softmax": softmax,
        "top_p": top_p_not_beyond,
        "top_k": steps.top_k,
    },
)


# ---- google-deepmind/gemma

_BLOCK = 16


def temperature_rounded(logits: Array, value: float, dtype: str) -> Array:
    """Divide the logits by the temperature, which is rounded to the format of the logits first.

    `RandomSampling` and the others, google-deepmind/gemma at 7691fd4e, ``gemma/gm/text/_sampling.py``; a Python number
    takes the format of the array that it meets: JAX documentation, "Type promotion semantics".
    """
    return divided(logits, rounded(np.array(value, np.float32), dtype), dtype)


def top_p_and_ties(logits: Array, p: float, dtype: str) -> Array:
    """Keep the most likely tokens until their mass is at least p, and all whose logit ties with the last of them.

    `TopPSampling`, google-deepmind/gemma at 7691fd4e, ``gemma/gm/text/_sampling.py``.
    """
    descending = np.sort(logits)[::-1]
    mass = running_sums(probabilities(descending, dtype), dtype)
    # Where the sums end below p the index runs past the last token, where JAX reads NaN: nothing is removed.
    border = min(int(np.count_nonzero(mass < rounded(np.array(p, np.float32), dtype))), len(logits) - 1)
    return np.where(logits < descending[border], -np.inf, logits)


def probabilities(logits: Array, dtype: str) -> Array:
    """Softmax whose every operation is rounded to a format, but for its sum, which is rounded at the end.

    `jax.nn.softmax` and `jax.numpy.sum`, JAX 0.10.
    """
    weights = rounded(exp_below(rounded(logits - logits.max(), dtype)), dtype)
    return divided(weights, rounded(weights.sum(), dtype), dtype)


def divided(x: Array, by: Array, dtype: str) -> Array:
    """Divide by one number, the way XLA does: multiply by its reciprocal.

    The reciprocal is a float16 in float16, but a float32 in bfloat16, in which XLA does not compute: it widens, and
    rounds the result alone. Read from what JAX 0.10 compiles for a CPU, and held against it in ``tests/peers``.
    """
    reciprocal = np.float32(1) / by
    return rounded(x * (rounded(reciprocal, dtype) if dtype == "float16" else reciprocal), dtype)


def running_sums(x: Array, dtype: str) -> Array:
    """Running sums with each addition rounded, in the order of XLA: in blocks of 16, and over the blocks again so.

    A plain running sum in bfloat16 would stand still from the point where a probability is less than 1/512 of it. Read
    from what JAX 0.10 compiles for a CPU, and held against it in ``tests/peers``.
    """
    rows = -(-len(x) // _BLOCK)
    sums = np.pad(x, (0, rows * _BLOCK - len(x))).reshape(rows, _BLOCK)
    for i in range(1, _BLOCK):
        sums[:, i] = rounded(sums[:, i - 1] + sums[:, i], dtype)
    if rows > 1:
        sums[1:] = rounded(sums[1:] + running_sums(sums[:, -1], dtype)[:-1, None], dtype)
    return np.asarray(sums.reshape(-1)[: len(x)])


def _refusal_of_deepmind(params: SamplingParams, context: Context) -> str:
    if params.temperature == 0:
        return (
            "google-deepmind/gemma divides by temperature 0: its greedy choice is the method Greedy, not a temperature"
        )
    if is_on(params, "top_k") and is_on(params, "top_p"):
        return "google-deepmind/gemma cannot combine top_k and top_p: TopkSampling and TopPSampling are two methods"
    return _too_many("google-deepmind/gemma", params, context, "jax.lax.top_k takes no more")


def _too_many(name: str, params: SamplingParams, context: Context, reason: str) -> str:
    if params.top_k is None or params.top_k <= context.V:
        return ""
    return f"{name} refuses top_k {params.top_k}: there are {context.V} tokens, and {reason}"


DEEPMIND = engine_of(
    "google-deepmind/gemma",
    "google-deepmind/gemma at 7691fd4e: gemma/gm/text/_sampling.py, _sampler_loop.py",
    {
        "banned": steps.banned,
        "top_k": steps.top_k,
        "temperature": temperature_rounded,
        "top_p": top_p_and_ties,
    },
    _refusal_of_deepmind,
)


# ---- KerasHub


def top_p_of_all(probs: Array, p: float) -> Array:
    """Keep a token as long as the mass of the more likely ones, as it was before top-k, is not above p.

    `TopPSampler.get_next_token`, keras-team/keras-hub at 71453d08, ``keras_hub/src/samplers/top_p_sampler.py``.
    """
    left = np.flatnonzero(probs > -np.inf)
    descending = left[np.argsort(-probs[left], kind="stable")]
    mass = np.cumsum(probs[descending])
    return only(probs, descending[: 1 + np.count_nonzero(mass <= np.float32(p))])


def _refusal_of_keras_hub(params: SamplingParams, context: Context) -> str:
    if params.temperature == 0:
        return "keras-hub divides by temperature 0: its greedy choice is GreedySampler, not a temperature"
    return _too_many("keras-hub", params, context, "its top_k takes no more")


KERAS_HUB = engine_of(
    "keras-hub",
    "keras-team/keras-hub at 71453d08: keras_hub/src/samplers",
    {"temperature": steps.temperature, "softmax": softmax, "top_k": steps.top_k, "top_p": top_p_of_all},
    _refusal_of_keras_hub,
)


# ---- gemma.cpp


def top_k_packed(logits: Array, k: int) -> Array:
    """Keep exactly the k largest logits, less their last three bits, which make room for the token id.

    `PackTokenAndProb` and `TopK`, google/gemma.cpp at 3ed403e2, ``ops/ops-inl.h``: a double holds the logit in its
    upper half, and the id in its lower.
    """
    left = np.flatnonzero(logits > -np.inf)
    upper = logits[left].astype(np.float64).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
    packed = (upper | left.astype(np.uint64)).view(np.float64)
    stay = left[np.argsort(-packed, kind="stable")[:k]]
    return only((logits.view(np.uint32) & np.uint32(0xFFFFFFF8)).view(np.float32), stay)


def temperature_without_effect(probs: Array, value: float) -> Array:
    """Divide the exponentials by the temperature, which their sum undoes: it has no effect in this version.

    Meant was a division before the exponential: https://github.com/google/gemma.cpp/pull/981.

    `Softmax`, google/gemma.cpp at 3ed403e2, ``ops/ops-inl.h``.
    """
    return np.where(probs > -np.inf, probs * (np.float32(1) / np.float32(value)), -np.inf)


def _steps_of_gemma_cpp(params: SamplingParams, context: Context) -> list[Step]:
    reason = _too_many("gemma.cpp", params, context, "it stops where k is larger")
    refuse("gemma.cpp", params, ("banned", "top_k", "temperature"), reason)
    chosen = steps_in({"banned": steps.banned}, params, context)  # a filter, accept_token
    k = context.V if params.top_k is None else params.top_k
    if k == 1 and not chosen:  # a short cut of its own, in full precision
        return [("top_k", partial(steps.top_k, k=1))]
    chosen += [("top_k", partial(top_k_packed, k=k)), ("softmax", softmax)]
    if is_on(params, "temperature"):
        chosen.append(("temperature", partial(temperature_without_effect, value=params.temperature)))
    return chosen


GEMMA_CPP = Engine("gemma.cpp", "google/gemma.cpp at 3ed403e2: ops/ops-inl.h, gemma/gemma.cc", _steps_of_gemma_cpp)
