"""llama.cpp: truncation first, temperature last; penalties over a window that runs from the prompt into the output.

This is the default chain without what `SamplingParams` cannot say (grammar, DRY, top-n-sigma, XTC).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps as shared
from refgemma.sampling.decision import Step
from refgemma.sampling.engines.engine import Context, Engine
from refgemma.sampling.engines.parts import first_maximum, is_on, softmax
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps.selection import only

WINDOW = 64  # penalty_last_n


def steps(params: SamplingParams, context: Context) -> list[Step]:
    """Steps that these settings switch on."""
    bind = functools.partial
    window = [*context.prompt, *context.output][-(params.penalty_window or WINDOW) :]
    chosen: list[Step] = []
    if is_on(params, "logit_bias"):
        chosen.append(("logit_bias", bind(shared.logit_bias, biases=dict(params.logit_bias))))
    if is_on(params, "banned"):
        chosen.append(("banned", bind(shared.banned, tokens=tuple(params.banned))))
    if is_on(params, "repetition_penalty") and window:
        penalty = bind(repetition_penalty_in_window, window=window, penalty=params.repetition_penalty)
        chosen.append(("repetition_penalty", penalty))
    if (params.frequency_penalty or params.presence_penalty) and window:
        counts = bind(
            count_penalties_in_window,
            window=window,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
        )
        chosen.append(("frequency_penalty" if params.frequency_penalty else "presence_penalty", counts))
    if params.top_k is not None:
        chosen.append(("top_k", bind(shared.top_k, k=params.top_k)))
    if params.typical_p is not None and params.typical_p < 1:
        chosen.append(("typical", bind(typical_beyond, p=params.typical_p)))
    if params.top_p is not None and params.top_p < 1:
        chosen.append(("top_p", bind(top_p_reaching, p=params.top_p)))
    if params.min_p:
        chosen.append(("min_p", bind(min_p_of_logits, p=params.min_p)))
    if params.temperature == 0:
        return [*chosen, ("greedy", first_maximum)]
    if is_on(params, "temperature"):
        chosen.append(("temperature", bind(shared.temperature, value=params.temperature)))
    return chosen


def repetition_penalty_in_window(logits: Array, window: Sequence[int], penalty: float) -> Array:
    """Make every token of the last 64, or of the given window, less likely, prompt included.

    `llama_sampler_penalties_apply`, ngxson/llama.cpp at 3f545bec, ``src/llama-sampler.cpp``; the window of 64 is
    ``penalty_last_n`` in ``common/common.h``.

    logits (V,).
    """
    return shared.repetition_penalty(logits, window, penalty)


def count_penalties_in_window(logits: Array, window: Sequence[int], frequency: float, presence: float) -> Array:
    """Subtract the frequency penalty for every time a token stands in the window, prompt included, and presence once.

    `llama_sampler_penalties_apply`, ngxson/llama.cpp at 3f545bec, ``src/llama-sampler.cpp``.

    logits (V,).
    """
    out = logits.copy()
    ids, counts = np.unique(np.asarray(window, dtype=np.int64), return_counts=True)
    out[ids] -= counts.astype(logits.dtype) * frequency + presence
    return out


def typical_beyond(logits: Array, p: float) -> Array:
    """Keep the tokens nearest to the expected surprise until their mass exceeds p.

    `llama_sampler_typical_apply`, ngxson/llama.cpp at 3f545bec, ``src/llama-sampler.cpp``.

    logits (V,).
    """
    left = np.flatnonzero(logits > -np.inf)
    probs = softmax(logits[left])
    surprise = -np.log(probs)
    expected = np.sum(probs * surprise, where=probs > 0)
    nearest = np.argsort(np.abs(surprise - expected), kind="stable")
    mass = np.cumsum(probs[nearest])
    return only(logits, left[nearest[: 1 + np.count_nonzero(mass <= np.float32(p))]])


def top_p_reaching(logits: Array, p: float) -> Array:
    """Keep the most likely tokens until their mass, that of the last included, is at least p.

    The walk stops at equality, as with transformers, but its float32 running sum starts at the most likely token.

    `llama_sampler_top_p_apply`, ngxson/llama.cpp at 3f545bec, ``src/llama-sampler.cpp``.

    logits (V,).
    """
    left = np.flatnonzero(logits > -np.inf)
    descending = left[np.argsort(-logits[left], kind="stable")]
    mass = np.cumsum(softmax(logits[descending]))
    return only(logits, descending[: 1 + np.count_nonzero(mass < np.float32(p))])


def min_p_of_logits(logits: Array, p: float) -> Array:
    """Remove every token whose logit is below the highest plus log(p).

    `llama_sampler_min_p_apply`, ngxson/llama.cpp at 3f545bec, ``src/llama-sampler.cpp``.

    logits (V,).
    """
    return np.where(logits < logits.max() + np.log(np.float32(p)), -np.inf, logits)


ENGINE = Engine(
    "llama.cpp",
    "ngxson/llama.cpp at 3f545bec: src/llama-sampler.cpp, common/common.h (default chain)",
    steps,
    total=np.float64,
)
