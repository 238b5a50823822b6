"""google-deepmind/gemma: one sampling method at a time, top-k or top-p; top-p keeps all that tie with its last.

A limit: the engine computes in the format of its logits, from the temperature to the running sums of top-p; the steps
here are float32 from the start. From float32 logits they compute what the engine does; from half-precision logits its
rounding, and the ties that come of it, are not imitated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps as shared
from refgemma.sampling.engines.engine import Engine, Step
from refgemma.sampling.engines.parts import Refused, is_on, refuse, softmax
from refgemma.sampling.params import SamplingParams

NAME = "google-deepmind/gemma"


def steps(params: SamplingParams, prompt: Sequence[int], output: Sequence[int], V: int) -> list[Step]:
    """Steps that these settings switch on.

    Parameters
    ----------
    params : SamplingParams
        The settings.
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
        Where the engine does not have a setting, or not together with another.
    """
    refuse(NAME, params, "repetition_penalty", "frequency_penalty", "presence_penalty", "penalty_window")
    refuse(NAME, params, "logit_bias", "min_p", "typical_p")
    if params.temperature == 0:
        raise Refused(f"{NAME} divides by temperature 0: its greedy choice is the method Greedy, not a temperature")
    if is_on(params, "top_k") and is_on(params, "top_p"):
        raise Refused(f"{NAME} cannot combine top_k and top_p: TopkSampling and TopPSampling are two methods")
    if params.top_k is not None and params.top_k > V:
        raise Refused(f"{NAME} refuses top_k {params.top_k}: there are {V} tokens, and jax.lax.top_k takes no more")
    bind = functools.partial
    chosen: list[Step] = []
    if is_on(params, "banned"):
        chosen.append(("banned", bind(shared.banned, tokens=tuple(params.banned))))
    if params.top_k is not None:
        chosen.append(("top_k", bind(shared.top_k, k=params.top_k)))
    if is_on(params, "temperature"):
        chosen.append(("temperature", bind(shared.temperature, value=params.temperature)))
    if params.top_p is not None and params.top_p < 1:
        chosen.append(("top_p", bind(top_p_and_ties, p=params.top_p)))
    return chosen


def top_p_and_ties(logits: Array, p: float) -> Array:
    """Keep the most likely tokens until their mass is at least p, and all whose logit ties with the last of them.

    Parameters
    ----------
    logits : ndarray of float32, shape (V,)
        Scores.
    p : float
        Share of the probability, below 1.

    Returns
    -------
    ndarray, shape (V,)
        With all others removed (the engine gives them the lowest finite float32, which comes to the same).

    References
    ----------
    `TopPSampling`, google-deepmind/gemma at 7691fd4e, ``gemma/gm/text/_sampling.py``.
    """
    descending = np.sort(logits)[::-1]
    mass = np.cumsum(np.maximum(softmax(descending), 0))
    # Where float32 sums end below p the index runs past the last token, where JAX reads NaN: nothing is removed.
    border = min(int(np.count_nonzero(mass < np.float32(p))), len(logits) - 1)
    return np.where(logits < descending[border], -np.inf, logits)


ENGINE = Engine(NAME, "google-deepmind/gemma at 7691fd4e: gemma/gm/text/_sampling.py, _sampler_loop.py", steps)
