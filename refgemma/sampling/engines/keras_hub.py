"""keras-hub: top-k, then top-p of the probabilities as they were before top-k, keeping one token more at equality."""

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
    refuse("keras-hub", params, "repetition_penalty", "frequency_penalty", "presence_penalty", "penalty_window")
    refuse("keras-hub", params, "logit_bias", "banned", "min_p", "typical_p")
    if params.temperature == 0:
        raise Refused("keras-hub divides by temperature 0: its greedy choice is GreedySampler, not a temperature")
    if params.top_k is not None and params.top_k > context.V:
        raise Refused(
            f"keras-hub refuses top_k {params.top_k}: there are {context.V} tokens, and its top_k takes no more"
        )
    bind = functools.partial
    chosen: list[Step] = []
    if is_on(params, "temperature"):
        chosen.append(("temperature", bind(shared.temperature, value=params.temperature)))
    chosen.append(("softmax", softmax))
    if params.top_k is not None:
        chosen.append(("top_k", bind(shared.top_k, k=params.top_k)))
    if params.top_p is not None and params.top_p < 1:
        chosen.append(("top_p", bind(top_p_not_beyond, p=params.top_p)))
    return chosen


def top_p_not_beyond(probs: Array, p: float) -> Array:
    """Keep a token as long as the mass of the more likely ones, as it was before top-k, is not above p.

    `TopPSampler.get_next_token`, keras-team/keras-hub at 71453d08, ``keras_hub/src/samplers/top_p_sampler.py``.

    probs (V,).
    """
    left = np.flatnonzero(probs > -np.inf)
    descending = left[np.argsort(-probs[left], kind="stable")]
    mass = np.cumsum(probs[descending])
    return only(probs, descending[: 1 + np.count_nonzero(mass <= np.float32(p))])


ENGINE = Engine("keras-hub", "keras-team/keras-hub at 71453d08: keras_hub/src/samplers", steps)
