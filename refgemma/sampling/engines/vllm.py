"""vLLM: the rules of transformers, with min-p before top-k, and the penalties of the OpenAI API."""

from __future__ import annotations

import functools

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps as shared
from refgemma.sampling.decision import Step
from refgemma.sampling.engines.engine import Context, Engine
from refgemma.sampling.engines.parts import Refused, first_maximum, is_on, refuse
from refgemma.sampling.engines.transformers import min_p_of_probabilities, top_k_and_ties, top_p_from_below
from refgemma.sampling.params import SamplingParams

COLDEST = 0.01


def steps(params: SamplingParams, context: Context) -> list[Step]:
    """Steps that these settings switch on."""
    refuse("vllm", params, "penalty_window", "typical_p")
    for name, low, high in (("temperature", 0, 2), ("frequency_penalty", -2, 2), ("presence_penalty", -2, 2)):
        if not low <= getattr(params, name) <= high:
            raise Refused(f"vllm refuses {name} {getattr(params, name)}: it must be in [{low}, {high}]")
    if params.top_p == 0:
        raise Refused("vllm refuses top_p 0.0: it must be in (0, 1]")
    bind = functools.partial
    tokens = [*context.prompt, *context.output]
    chosen: list[Step] = []
    if is_on(params, "banned"):
        chosen.append(("banned", bind(shared.banned, tokens=tuple(params.banned))))
    if is_on(params, "logit_bias"):
        clipped = {token: min(max(bias, -100.0), 100.0) for token, bias in dict(params.logit_bias).items()}
        chosen.append(("logit_bias", bind(shared.logit_bias, biases=clipped)))
    if is_on(params, "repetition_penalty") and tokens:
        penalty = bind(shared.repetition_penalty, tokens=tokens, penalty=params.repetition_penalty)
        chosen.append(("repetition_penalty", penalty))
    if params.frequency_penalty and context.output:
        frequency = bind(shared.frequency_penalty, output_tokens=context.output, penalty=params.frequency_penalty)
        chosen.append(("frequency_penalty", frequency))
    if params.presence_penalty and context.output:
        presence = bind(shared.presence_penalty, output_tokens=context.output, penalty=params.presence_penalty)
        chosen.append(("presence_penalty", presence))
    if params.temperature == 0:
        return [*chosen, ("greedy", first_maximum)]
    if is_on(params, "temperature"):
        chosen.append(("temperature", bind(temperature_from_a_hundredth, value=params.temperature)))
    if params.min_p:
        chosen.append(("min_p", bind(min_p_of_probabilities, p=params.min_p)))
    if params.top_k is not None:
        chosen.append(("top_k", bind(top_k_and_ties, k=params.top_k)))
    if params.top_p is not None and params.top_p < 1:
        chosen.append(("top_p", bind(top_p_from_below, p=np.float32(params.top_p))))
    return chosen


def temperature_from_a_hundredth(logits: Array, value: float) -> Array:
    """Divide the logits by the temperature, taken as 0.01 where it is lower.

    `SamplingParams` in vLLM, main of mid-2026, ``vllm/sampling_params.py``, which says so in a warning.

    logits (V,).
    """
    return shared.temperature(logits, max(value, COLDEST))


ENGINE = Engine(
    "vllm", "vLLM, main of mid-2026: v1/sample/sampler.py, v1/sample/ops/topk_topp_sampler.py (PyTorch path)", steps
)
