"""gemma.cpp: exactly k tokens and their softmax; a temperature that, in this version, has no effect."""

from __future__ import annotations

import functools

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps as shared
from refgemma.sampling.decision import Step
from refgemma.sampling.engines.engine import Context, Engine
from refgemma.sampling.engines.parts import Refused, is_on, refuse, softmax
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps.selection import only


def steps(params: SamplingParams, context: Context) -> list[Step]:
    """Steps that these settings switch on."""
    refuse("gemma.cpp", params, "repetition_penalty", "frequency_penalty", "presence_penalty", "penalty_window")
    refuse("gemma.cpp", params, "logit_bias", "top_p", "min_p", "typical_p")
    k = context.V if params.top_k is None else params.top_k
    if k > context.V:
        raise Refused(f"gemma.cpp refuses top_k {k}: there are {context.V} tokens, and it stops where k is larger")
    bind = functools.partial
    chosen: list[Step] = []
    if is_on(params, "banned"):  # a filter, accept_token
        chosen.append(("banned", bind(shared.banned, tokens=tuple(params.banned))))
    if k == 1 and not chosen:  # a short cut of its own, in full precision
        return [("top_k", bind(shared.top_k, k=1))]
    chosen += [("top_k", bind(top_k_packed, k=k)), ("softmax", softmax)]
    if is_on(params, "temperature"):
        chosen.append(("temperature", bind(temperature_without_effect, value=params.temperature)))
    return chosen


def top_k_packed(logits: Array, k: int) -> Array:
    """Keep exactly the k largest logits, less their last three bits, which make room for the token id.

    `PackTokenAndProb` and `TopK`, google/gemma.cpp at 3ed403e2, ``ops/ops-inl.h``: a double holds the logit in its
    upper half, and the id in its lower.

    logits (V,).
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

    probs (V,).
    """
    return np.where(probs > -np.inf, probs * (np.float32(1) / np.float32(value)), -np.inf)


ENGINE = Engine("gemma.cpp", "google/gemma.cpp at 3ed403e2: ops/ops-inl.h, gemma/gemma.cc", steps)
