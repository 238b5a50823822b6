"""gemma_pytorch: top-p on the full distribution, keeping one token more at equality, then top-k by rank.

The quotient by the temperature is kept in the format of the logits, which in half precision makes ties of what was
none; from its softmax on the engine computes in float32.
"""

from __future__ import annotations

import functools

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps as shared
from refgemma.sampling.decision import Step
from refgemma.sampling.engines.engine import Context, Engine
from refgemma.sampling.engines.parts import first_maximum, is_on, refuse, rounded, softmax
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps.selection import only


def steps(params: SamplingParams, context: Context) -> list[Step]:
    """Steps that these settings switch on."""
    refuse("gemma_pytorch", params, "repetition_penalty", "frequency_penalty", "presence_penalty", "penalty_window")
    refuse("gemma_pytorch", params, "logit_bias", "banned", "min_p", "typical_p")
    if params.temperature == 0:  # None there; top-k and top-p do not matter
        return [("greedy", first_maximum)]
    bind = functools.partial
    chosen: list[Step] = []
    if is_on(params, "temperature"):
        chosen.append(("temperature", bind(temperature_in_place, value=params.temperature, dtype=context.logits_dtype)))
    chosen.append(("softmax", softmax))
    if params.top_p is not None and params.top_p < 1:
        chosen.append(("top_p", bind(top_p_not_beyond, p=params.top_p)))
    if params.top_k is not None:
        chosen.append(("top_k", bind(shared.top_k, k=params.top_k)))
    return chosen


def temperature_in_place(logits: Array, value: float, dtype: str) -> Array:
    """Divide the logits by the temperature, and put the quotients in their place, in the format of the logits.

    `Sampler.forward`, google/gemma_pytorch at 014acb7a, ``gemma/model.py``: ``logits.div_(temperatures)``. PyTorch
    computes with two formats in the wider one, and writes the result in that of the tensor that it is put into.

    logits (V,).
    """
    return rounded(shared.temperature(logits, value), dtype)


def top_p_not_beyond(probs: Array, p: float) -> Array:
    """Keep a token as long as the mass of the more likely ones is not above p, so one more at equality.

    The mass before a token is the running sum less its own probability, which is where it may differ in the last bit
    from the running sum of the tokens before it. Running sums are rounded to float32 one by one, as torch does on the
    CPU.

    `Sampler.forward`, google/gemma_pytorch at 014acb7a, ``gemma/model.py``.

    probs (V,).
    """
    descending = np.argsort(-probs, kind="stable")
    own = np.maximum(probs[descending], 0)
    before = np.cumsum(own, dtype=np.float64).astype(np.float32) - own
    left = probs[descending] > -np.inf
    return only(probs, descending[left & (before <= np.float32(p))])


ENGINE = Engine("gemma_pytorch", "google/gemma_pytorch at 014acb7a: gemma/model.py, Sampler", steps)
