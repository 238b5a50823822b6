"""transformers and vLLM, whose PyTorch path has the same cuts: min-p before top-k there, after top-p here.

Both keep ties at the k-th token, and walk up from the least likely token for top-p.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps
from refgemma.sampling.engines.engine import Context, engine_of, softmax
from refgemma.sampling.params import SamplingParams


def top_k_and_ties(logits: Array, k: int) -> Array:
    """Keep every token at least as likely as the k-th most likely, so that ties there keep more than k.

    `TopKLogitsWarper` in transformers 5.23, ``generation/logits_process.py``; vLLM's PyTorch path has the same rule.
    """
    V = len(logits)
    if k >= V:
        return logits
    return np.where(logits < np.partition(logits, V - k)[V - k], -np.inf, logits)


def top_p_from_below(logits: Array, p: float | np.float32) -> Array:
    """Remove the least likely tokens while their mass together is at most 1 - p; the most likely one stays.

    The same as keeping a token while the mass of the more likely ones is below p, so that the walk stops at equality;
    but the sum starts at the small end, and so do its roundings. Running sums are rounded to float32 one by one, as
    torch does on the CPU.

    `TopPLogitsWarper` in transformers 5.23, ``generation/logits_process.py``.
    """
    ascending = np.argsort(logits, kind="stable")
    mass = np.cumsum(np.maximum(softmax(logits)[ascending], 0), dtype=np.float64).astype(np.float32)
    removed = mass <= np.float32(1 - p)
    removed[-1] = False
    out = logits.copy()
    out[ascending[removed]] = -np.inf
    return out


def min_p_of_probabilities(logits: Array, p: float) -> Array:
    """Remove every token whose probability is below p times the highest.

    `MinPLogitsWarper` in transformers 5.23, ``generation/logits_process.py``; vLLM has the same rule.
    """
    probs = softmax(logits)
    return np.where(probs < np.float32(p) * probs.max(), -np.inf, logits)


def typical_and_ties(logits: Array, p: float) -> Array:
    """Keep the tokens nearest to the expected surprise until their mass reaches p, and all that tie with the last.

    `TypicalLogitsWarper` in transformers 5.23, ``generation/logits_process.py``, after Meister et al., "Locally Typical
    Sampling", 2023, section 4.
    """
    probs = np.maximum(softmax(logits), 0)
    surprise = -np.log(probs)
    expected = np.sum(probs * surprise, where=probs > 0)
    distance = np.abs(surprise - expected)
    nearest = np.argsort(distance, kind="stable")
    mass = np.cumsum(probs[nearest], dtype=np.float64).astype(np.float32)
    last = min(int(np.count_nonzero(mass < np.float32(p))), len(logits) - 1)
    return np.where(distance > distance[nearest[last]], -np.inf, logits)


def temperature_from_a_hundredth(logits: Array, value: float) -> Array:
    """Divide the logits by the temperature, taken as 0.01 where it is lower.

    `SamplingParams` in vLLM, main of mid-2026, ``vllm/sampling_params.py``, which says so in a warning.
    """
    return steps.temperature(logits, max(value, 0.01))


@functools.wraps(steps.logit_bias)
def clipped_bias(logits: Array, biases: Mapping[int, float] | Iterable[tuple[int, float]]) -> Array:
    return steps.logit_bias(logits, {token: min(max(bias, -100.0), 100.0) for token, bias in dict(biases).items()})


@functools.wraps(top_p_from_below)
def top_p_in_float32(logits: Array, p: float) -> Array:
    return top_p_from_below(logits, np.float32(p))


def _refusal_of_transformers(params: SamplingParams, context: Context) -> str:
    if params.temperature == 0:
        return (
            "transformers refuses temperature 0.0: sampling needs a float above 0; its greedy choice is do_sample=False"
        )
    return "transformers refuses typical_p 0.0: it has to be above 0 and below 1" if params.typical_p == 0 else ""


def _refusal_of_vllm(params: SamplingParams, context: Context) -> str:
    for name, low, high in (("temperature", 0, 2), ("frequency_penalty", -2, 2), ("presence_penalty", -2, 2)):
        if not low <= getattr(params, name) <= high:
            return f"vllm refuses {name} {getattr(params, name)}: it must be in [{low}, {high}]"
    return "vllm refuses top_p 0.0: it must be in (0, 1]" if params.top_p == 0 else ""


TRANSFORMERS = engine_of(
    "transformers",
    "transformers 5.23: generation/logits_process.py, generation/utils.py",
    {
        "logit_bias": steps.logit_bias,
        "repetition_penalty": steps.repetition_penalty,
        "banned": steps.banned,
        "temperature": steps.temperature,
        "top_k": top_k_and_ties,
        "top_p": top_p_from_below,
        "min_p": min_p_of_probabilities,
        "typical": typical_and_ties,
    },
    _refusal_of_transformers,
)
VLLM = engine_of(
    "vllm",
    "vLLM, main of mid-2026: v1/sample/sampler.py, v1/sample/ops/topk_topp_sampler.py (PyTorch path)",
    {
        "banned": steps.banned,
        "logit_bias": clipped_bias,
        "repetition_penalty": steps.repetition_penalty,
        "frequency_penalty": steps.frequency_penalty,
        "presence_penalty": steps.presence_penalty,
        "temperature": temperature_from_a_hundredth,
        "min_p": min_p_of_probabilities,
        "top_k": top_k_and_ties,
        "top_p": top_p_in_float32,
    },
    _refusal_of_vllm,
)
