"""gemma_pytorch: top-p on the full distribution, keeping one token more at equality, then top-k by rank.

A limit: the engine divides by the temperature in the format of its logits, and goes over to float32 in its softmax; the
steps here are float32 from the start. From float32 logits they compute what the engine does; from half-precision logits
the engine's rounding of that quotient is not imitated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps as shared
from refgemma.sampling.engines.engine import Engine, Step
from refgemma.sampling.engines.parts import first_maximum, is_on, refuse, softmax
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps.cuts import only


def steps(params: SamplingParams, prompt: Sequence[int], output: Sequence[int], V: int) -> list[Step]:
    """Steps that these settings switch on.

    Parameters
    ----------
    params : SamplingParams
        The settings; its own default of top_k = 64 does not act.
    prompt, output : sequence of int
        Not looked at.
    V : int
        Size of the vocabulary.

    Returns
    -------
    list of (str, callable)
        In order.

    Raises
    ------
    Refused
        Where the engine does not have a setting.
    """
    refuse("gemma_pytorch", params, "repetition_penalty", "frequency_penalty", "presence_penalty", "penalty_window")
    refuse("gemma_pytorch", params, "logit_bias", "banned", "min_p", "typical_p")
    if params.temperature == 0:  # None there; top-k and top-p do not matter
        return [("greedy", first_maximum)]
    bind = functools.partial
    chosen: list[Step] = []
    if is_on(params, "temperature"):
        chosen.append(("temperature", bind(shared.temperature, value=params.temperature)))
    chosen.append(("softmax", softmax))
    if params.top_p is not None and params.top_p < 1:
        chosen.append(("top_p", bind(top_p_not_beyond, p=params.top_p)))
    if params.top_k is not None:
        chosen.append(("top_k", bind(shared.top_k, k=params.top_k)))
    return chosen


def top_p_not_beyond(probs: Array, p: float) -> Array:
    """Keep a token as long as the mass of the more likely ones is not above p, so one more at equality.

    Parameters
    ----------
    probs : ndarray of float32, shape (V,)
        Probabilities of the full distribution.
    p : float
        Share of the probability.

    Returns
    -------
    ndarray, shape (V,)
        With all others removed. Which of tied tokens stays is unspecified there (an unstable sort); here the lower id.

    Notes
    -----
    The mass before a token is the running sum less its own probability, which is where it may differ in the last bit
    from the running sum of the tokens before it. Running sums are rounded to float32 one by one, as torch does on the
    CPU.

    References
    ----------
    `Sampler.forward`, google/gemma_pytorch at 014acb7a, ``gemma/model.py``.
    """
    descending = np.argsort(-probs, kind="stable")
    own = np.maximum(probs[descending], 0)
    before = np.cumsum(own, dtype=np.float64).astype(np.float32) - own
    left = probs[descending] > -np.inf
    return only(probs, descending[left & (before <= np.float32(p))])


ENGINE = Engine("gemma_pytorch", "google/gemma_pytorch at 014acb7a: gemma/model.py, Sampler", steps)
