"""transformers: penalties, temperature, top-k with its ties, then top-p as a walk up from the least likely token."""

from __future__ import annotations

import functools

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps as shared
from refgemma.sampling.decision import Step
from refgemma.sampling.engines.engine import Context, Engine
from refgemma.sampling.engines.parts import Refused, is_on, refuse, softmax
from refgemma.sampling.params import SamplingParams


def steps(params: SamplingParams, context: Context) -> list[Step]:
    """Steps that these settings switch on."""
    refuse("transformers", params, "frequency_penalty", "presence_penalty", "penalty_window")
    if params.temperature == 0:
        raise Refused(
            "transformers refuses temperature 0.0: sampling needs a float above 0; its greedy choice is do_sample=False"
        )
    bind = functools.partial
    tokens = [*context.prompt, *context.output]
    chosen: list[Step] = []
    if is_on(params, "logit_bias"):
        chosen.append(("logit_bias", bind(shared.logit_bias, biases=dict(params.logit_bias))))
    if is_on(params, "repetition_penalty") and tokens:
        penalty = bind(shared.repetition_penalty, tokens=tokens, penalty=params.repetition_penalty)
        chosen.append(("repetition_penalty", penalty))
    if is_on(params, "banned"):
        chosen.append(("banned", bind(shared.banned, tokens=tuple(params.banned))))
    if is_on(params, "temperature"):
        chosen.append(("temperature", bind(shared.temperature, value=params.temperature)))
    if params.top_k is not None:
        chosen.append(("top_k", bind(top_k_and_ties, k=params.top_k)))
    if params.top_p is not None and params.top_p < 1:
        chosen.append(("top_p", bind(top_p_from_below, p=params.top_p)))
    if params.min_p:
        chosen.append(("min_p", bind(min_p_of_probabilities, p=params.min_p)))
    if params.typical_p is not None and params.typical_p < 1:
        if params.typical_p == 0:
            raise Refused("transformers refuses typical_p 0.0: it has to be above 0 and below 1")
        chosen.append(("typical", bind(typical_and_ties, p=params.typical_p)))
    return chosen


def top_k_and_ties(logits: Array, k: int) -> Array:
    """Keep every token at least as likely as the k-th most likely, so that ties there keep more than k.

    `TopKLogitsWarper` in transformers 5.23, ``generation/logits_process.py``; vLLM's PyTorch path has the same rule.

    logits (V,).
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

    logits (V,).
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

    logits (V,).
    """
    probs = softmax(logits)
    return np.where(probs < np.float32(p) * probs.max(), -np.inf, logits)


def typical_and_ties(logits: Array, p: float) -> Array:
    """Keep the tokens nearest to the expected surprise until their mass reaches p, and all that tie with the last.

    `TypicalLogitsWarper` in transformers 5.23, ``generation/logits_process.py``, after Meister et al., "Locally Typical
    Sampling", 2023, section 4.

    logits (V,).
    """
    probs = np.maximum(softmax(logits), 0)
    surprise = -np.log(probs)
    expected = np.sum(probs * surprise, where=probs > 0)
    distance = np.abs(surprise - expected)
    nearest = np.argsort(distance, kind="stable")
    mass = np.cumsum(probs[nearest], dtype=np.float64).astype(np.float32)
    last = min(int(np.count_nonzero(mass < np.float32(p))), len(logits) - 1)
    return np.where(distance > distance[nearest[last]], -np.inf, logits)


ENGINE = Engine("transformers", "transformers 5.23: generation/logits_process.py, generation/utils.py", steps)
