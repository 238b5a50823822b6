"""OpenAI's API as far as it is documented: a bias and two penalties on the logits, and a temperature."""

from __future__ import annotations

import functools

from refgemma.sampling import steps as shared
from refgemma.sampling.decision import Step
from refgemma.sampling.engines.engine import Context, Engine
from refgemma.sampling.engines.parts import Refused, first_maximum, is_on, refuse
from refgemma.sampling.params import SamplingParams

RANGES = {"temperature": (0, 2), "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2)}


def steps(params: SamplingParams, context: Context) -> list[Step]:
    """Steps that these settings switch on.

    OpenAI, "Frequency and presence penalties" and the reference of chat completions, API documentation.
    """
    refuse("openai", params, "repetition_penalty", "penalty_window", "top_k", "min_p", "typical_p", "banned")
    if is_on(params, "top_p"):
        raise Refused(
            f"openai documents top_p (given {params.top_p}) as a share of mass, neither its border nor its order: "
            "leave it at 1 to see the documented penalties"
        )
    for name, (low, high) in RANGES.items():
        if not low <= getattr(params, name) <= high:
            raise Refused(f"openai refuses {name} {getattr(params, name)}: it must be between {low} and {high}")
    bind = functools.partial
    chosen: list[Step] = []
    if is_on(params, "logit_bias"):
        beyond = [bias for bias in dict(params.logit_bias).values() if not -100 <= bias <= 100]
        if beyond:
            raise Refused(f"openai refuses a logit_bias of {beyond[0]}: it must be between -100 and 100")
        chosen.append(("logit_bias", bind(shared.logit_bias, biases=dict(params.logit_bias))))
    if params.frequency_penalty and context.output:
        frequency = bind(shared.frequency_penalty, output_tokens=context.output, penalty=params.frequency_penalty)
        chosen.append(("frequency_penalty", frequency))
    if params.presence_penalty and context.output:
        presence = bind(shared.presence_penalty, output_tokens=context.output, penalty=params.presence_penalty)
        chosen.append(("presence_penalty", presence))
    if params.temperature == 0:
        return [*chosen, ("greedy", first_maximum)]
    if is_on(params, "temperature"):
        chosen.append(("temperature", bind(shared.temperature, value=params.temperature)))
    return chosen


ENGINE = Engine("openai", "OpenAI API documentation: Frequency and presence penalties", steps)
