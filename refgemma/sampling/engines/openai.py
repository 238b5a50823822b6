"""OpenAI's API as far as it is documented: a bias and two penalties on the logits, and a temperature."""

from __future__ import annotations

from refgemma.sampling import steps
from refgemma.sampling.engines.engine import Context, engine_of, is_on
from refgemma.sampling.params import SamplingParams

_RANGES = {"temperature": (0, 2), "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2)}


def _refusal(params: SamplingParams, context: Context) -> str:
    if is_on(params, "top_p"):
        return (
            f"openai documents top_p (given {params.top_p}) as a share of mass, neither its border nor its order: "
            "leave it at 1 to see the documented penalties"
        )
    for name, (low, high) in _RANGES.items():
        if not low <= getattr(params, name) <= high:
            return f"openai refuses {name} {getattr(params, name)}: it must be between {low} and {high}"
    beyond = [bias for bias in dict(params.logit_bias).values() if not -100 <= bias <= 100]
    return f"openai refuses a logit_bias of {beyond[0]}: it must be between -100 and 100" if beyond else ""


OPENAI = engine_of(
    "openai",
    "OpenAI API documentation: Frequency and presence penalties",
    {
        "logit_bias": steps.logit_bias,
        "frequency_penalty": steps.frequency_penalty,
        "presence_penalty": steps.presence_penalty,
        "temperature": steps.temperature,
    },
    _refusal,
)
