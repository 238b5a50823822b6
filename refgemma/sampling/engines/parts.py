"""What several engines share: which settings are on, how a format rounds, and steps that are nobody's own."""

from __future__ import annotations

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import Array, from_bfloat16, to_bfloat16
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps.selection import exp_below, only


class Refused(InputError):
    """An engine does not take these settings, or gets no probabilities from them."""


# What a setting is when it does nothing; anything else asks for a step.
OFF: dict[str, tuple[object, ...]] = {
    "repetition_penalty": (1.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "penalty_window": (None,),
    "temperature": (1.0,),
    "top_k": (None,),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "logit_bias": ((),),
    "banned": ((),),
}


def is_on(params: SamplingParams, name: str) -> bool:
    """Whether a setting asks for anything."""
    return getattr(params, name) not in OFF[name]


def refuse(engine: str, params: SamplingParams, *names: str) -> None:
    """Raise where a setting is on that the engine does not have."""
    for name in names:
        if is_on(params, name):
            raise Refused(f"{engine} has no {name} (given {getattr(params, name)!r}): leave it at {OFF[name][0]!r}")


def rounded(x: Array, dtype: str) -> Array:
    """Round to what a format can hold."""
    if dtype == "bfloat16":
        return from_bfloat16(to_bfloat16(x))
    with np.errstate(over="ignore"):
        return x.astype(dtype).astype(np.float32, copy=False)


def softmax(logits: Array) -> Array:
    """Turn logits into probabilities. logits (V,)."""
    weights = exp_below(logits)
    return np.where(logits > -np.inf, weights / weights.sum(), -np.inf).astype(logits.dtype, copy=False)


def first_maximum(logits: Array) -> Array:
    """Keep the most likely token alone, on ties the lowest id. logits (V,)."""
    return only(logits, np.array([logits.argmax()]))
