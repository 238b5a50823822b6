"""The pure steps of sampling: logits in, logits out, removed tokens at minus infinity.

Every step takes float64 logits of shape (V,) and leaves that array alone; none draws, none keeps anything. Where
engines disagree, the docstring says what this one does.
"""

from refgemma.sampling.steps.adjust import (
    banned,
    frequency_penalty,
    logit_bias,
    presence_penalty,
    repetition_penalty,
    temperature,
)
from refgemma.sampling.steps.cuts import min_p, top_k, top_p, typical

__all__ = [
    "banned",
    "frequency_penalty",
    "logit_bias",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical",
]
