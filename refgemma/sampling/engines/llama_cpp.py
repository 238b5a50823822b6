"""llama.cpp: truncation first, temperature last; penalties over a window that runs from the prompt into the output.

This is the default chain without what `SamplingParams` cannot express (grammar, DRY, top-n-sigma, XTC).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps
from refgemma.sampling.decision import Step
from refgemma.sampling.engines.engine import Context, Engine, softmax, steps_in
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps import only

_WINDOW = 64  # penalty_last_n


def repetition_penalty_in_window(logits: Array, tokens: Sequence[int], penalty: float) -> Array:
    """Make every token of the last 64, or of the given window, less likely, prompt included.

    `llama_sampler_penalties_apply`, ngxson/llama.cpp at 3f545bec, ``src/llama-sampler.cpp``; the window of 64 is
    ``penalty_last_n`` in ``common/common.h``.
    """
    return steps.repetition_penalty(logits, tokens, penalty)


def count_penalties_in_window(logits: Array, output_tokens: Sequence[int], frequency: float, presence: float) -> Array:
    """Subtract the frequency penalty for every time a token occurs in the window, prompt included, and presence once.

    `llama_sampler_penalties_apply`, ngxson/llama.cpp at 3f545bec, ``src/llama-sampler.cpp``.
    """
    out = logits.copy()
    ids, counts = np.unique(np.asarray(output_tokens, dtype=np.int64), return_counts=True)
    out[ids] -= counts.astype(logits.dtype) * frequency + presence
    return out


def typical_beyond(logits: Array, p: float) -> Array:
    """Keep the tokens nearest to the expected surprise until their mass exceeds p.

    `llama_sampler_typical_apply`, ngxson/llama.cpp at 3f545bec, ``src/llama-sampler.cpp``.
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
    """
    left = np.flatnonzero(logits > -np.inf)
    descending = left[np.argsort(-logits[left], kind="stable")]
    mass = np.cumsum(softmax(logits[descending]))
    return only(logits, descending[: 1 + np.count_nonzero(mass < np.float32(p))])


def min_p_of_logits(logits: Array, p: float) -> Array:
    """Remove every token whose logit is below the highest plus log(p).

    `llama_sampler_min_p_apply`, ngxson/llama.cpp at 3f545bec, ``src/llama-sampler.cpp``.
    """
    return np.where(logits < logits.max() + np.log(np.float32(p)), -np.inf, logits)


_ORDER: dict[str, Callable[..., Array]] = {
    "logit_bias": steps.logit_bias,
    "banned": steps.banned,
    "repetition_penalty": repetition_penalty_in_window,
    "frequency_penalty": count_penalties_in_window,
    "presence_penalty": count_penalties_in_window,
    "top_k": steps.top_k,
    "typical": typical_beyond,
    "top_p": top_p_reaching,
    "min_p": min_p_of_logits,
    "temperature": steps.temperature,
}


def _steps(params: SamplingParams, context: Context) -> list[Step]:
    order = dict(_ORDER)
    if params.frequency_penalty:  # one step subtracts both
        del order["presence_penalty"]
    window = [*context.prompt, *context.output][-(params.penalty_window or _WINDOW) :]
    return steps_in(order, params, replace(context, prompt=(), output=window))


LLAMA_CPP = Engine(
    "llama.cpp",
    "ngxson/llama.cpp at 3f545bec: src/llama-sampler.cpp, common/common.h (default chain)",
    _steps,
    total=np.float64,
)
