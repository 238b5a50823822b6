"""The steps of sampling: logits in, logits out, removed tokens at minus infinity.

Every step takes float64 logits of shape (V,), returns an array of its own or, where it changes nothing, the one given,
and keeps no state. Adjustments change single logits. Cuts remove tokens and leave the other logits as they are: each
keeps the head of a list, top-k, top-p and min-p of the tokens from the most likely down, typical of the tokens from the
smallest distance up. Of tokens tied at a cut the lower ids stay; min-p keeps all of them. Where engines disagree, the
docstring says which rule this is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import Array

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

# Sorting the whole vocabulary would cost more than all other work here. The first _HEAD tokens nearly always suffice;
# where they do not, _GROWTH times as many are sorted.
_HEAD, _GROWTH = 1024, 16

# `largest` first takes the maximum of each of _GROUPS groups, and looks only at numbers above a floor that these give.
# This pays from _ROWS numbers per group, and where at most one number in _ROWS is above the floor.
_GROUPS, _ROWS = 4096, 8


# ---- adjustments


def logit_bias(logits: Array, biases: Mapping[int, float] | Iterable[tuple[int, float]]) -> Array:
    """Add a number to the logits of some tokens.

    Parameters
    ----------
    logits : ndarray of float64, shape (V,)
        Scores.
    biases : mapping of int to float, or pairs of them
        What is added to which token; above 0 makes it more likely. A removed token stays removed.

    Returns
    -------
    ndarray, shape (V,)
        ``logits[j] + bias[j]``.

    References
    ----------
    OpenAI, "logit_bias", API documentation of chat completions: added before sampling.
    """
    out = logits.copy()
    for token, bias in dict(biases).items():
        out[token] += bias
    return out


def banned(logits: Array, tokens: Iterable[int]) -> Array:
    """Remove some tokens.

    Parameters
    ----------
    logits : ndarray of float64, shape (V,)
        Scores.
    tokens : iterable of int
        Their ids.

    Returns
    -------
    ndarray, shape (V,)
        Minus infinity at these ids.

    Raises
    ------
    ValueError
        If nothing is left.
    """
    out = logits.copy()
    out[np.array(list(tokens), dtype=np.int64)] = -np.inf
    if out.max() == -np.inf:
        raise InputError("banned holds every token that could be chosen: expected it to leave at least one")
    return out


def repetition_penalty(logits: Array, tokens: Sequence[int], penalty: float) -> Array:
    """Make every token that has occurred less likely, once, however often it occurred.

    Parameters
    ----------
    logits : ndarray of float64, shape (V,)
        Scores.
    tokens : sequence of int
        The prompt and the output so far.
    penalty : float
        Above 0; 1 changes nothing, below 1 rewards repetition.

    Returns
    -------
    ndarray, shape (V,)
        Positive logits divided by `penalty`, others multiplied by it.

    References
    ----------
    Keskar et al., "CTRL: A Conditional Transformer Language Model", 2019, section 4.1; the rule for negative logits is
    that of transformers and vLLM.
    """
    out = logits.copy()
    ids = np.unique(np.asarray(tokens, dtype=np.int64))
    out[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return out


def frequency_penalty(logits: Array, output_tokens: Sequence[int], penalty: float) -> Array:
    """Subtract the penalty from a token's logit for every time it was generated.

    Parameters
    ----------
    logits : ndarray of float64, shape (V,)
        Scores.
    output_tokens : sequence of int
        The output so far; the prompt does not count.
    penalty : float
        In units of logits; 0 changes nothing.

    Returns
    -------
    ndarray, shape (V,)
        ``logits[j] - count[j] * penalty``.

    References
    ----------
    OpenAI, "Frequency and presence penalties", API documentation.
    """
    out = logits.copy()
    ids, counts = np.unique(np.asarray(output_tokens, dtype=np.int64), return_counts=True)
    out[ids] -= counts * penalty
    return out


def presence_penalty(logits: Array, output_tokens: Sequence[int], penalty: float) -> Array:
    """Subtract the penalty once from the logit of every token that was generated.

    Parameters
    ----------
    logits : ndarray of float64, shape (V,)
        Scores.
    output_tokens : sequence of int
        The output so far; the prompt does not count.
    penalty : float
        In units of logits; 0 changes nothing.

    Returns
    -------
    ndarray, shape (V,)
        ``logits[j] - penalty`` where j has occurred.

    References
    ----------
    OpenAI, "Frequency and presence penalties", API documentation.
    """
    out = logits.copy()
    out[np.unique(np.asarray(output_tokens, dtype=np.int64))] -= penalty
    return out


def temperature(logits: Array, value: float) -> Array:
    """Divide the logits: below 1 sharpens the distribution, above 1 flattens it.

    Parameters
    ----------
    logits : ndarray of float64, shape (V,)
        Scores.
    value : float
        Above 0.

    Returns
    -------
    ndarray, shape (V,)
        ``logits / value``.
    """
    return np.asarray(logits / value)


# ---- cuts


def top_k(logits: Array, k: int) -> Array:
    """Keep exactly the k most likely tokens.

    Parameters
    ----------
    logits : ndarray of float64, shape (V,)
        Scores.
    k : int
        At least 1; where fewer are left, all of them stay.

    Returns
    -------
    ndarray, shape (V,)
        With all others removed.

    References
    ----------
    Fan et al., "Hierarchical Neural Story Generation", 2018, section 5.4.
    """
    ids, values = left(logits)
    return only(logits, ids[largest(values, k)]) if k < len(values) else logits


def top_p(logits: Array, p: float) -> Array:
    """Keep the most likely tokens as long as the mass before them is below p.

    Parameters
    ----------
    logits : ndarray of float64, shape (V,)
        Scores.
    p : float
        Share of the probability that is left, 0 to 1; 0 keeps the most likely token, 1 keeps all.

    Returns
    -------
    ndarray, shape (V,)
        With all others removed.

    Notes
    -----
    The walk stops at equality: with probabilities .5, .25, .125, .125 and p = .75 two tokens stay. gemma_pytorch and
    keras-hub keep one more there.

    References
    ----------
    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1.
    """
    if p >= 1:
        return logits
    ids, values = left(logits)  # few, after another cut
    wanted = p * exp_below(values).sum()
    head = min(_HEAD, len(values))
    while True:
        weights = exp_below(np.sort(values[largest(values, head)])[::-1])
        before = np.cumsum(weights) - weights
        kept = max(1, int(np.count_nonzero(before < wanted)))
        if kept < head or head == len(values):
            return only(logits, ids[largest(values, kept)])
        head = min(_GROWTH * head, len(values))


def min_p(logits: Array, p: float) -> Array:
    """Keep tokens that are not too much less likely than the most likely one.

    Parameters
    ----------
    logits : ndarray of float64, shape (V,)
        Scores.
    p : float
        Smallest ratio to the highest probability, 0 to 1; 0 keeps all, 1 keeps the most likely token and its ties.

    Returns
    -------
    ndarray, shape (V,)
        With tokens removed whose probability is below p times the highest; at equality a token stays.

    Notes
    -----
    Ratios of probabilities are differences of logits, so nothing needs to be normalised:
    ``logits[j] - max(logits) >= log(p)``.

    References
    ----------
    Nguyen et al., "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs", 2024, section 3.
    """
    if p <= 0:
        return logits
    return np.where(logits - logits.max() >= math.log(p), logits, -np.inf)


def typical(logits: Array, p: float) -> Array:
    """Keep the tokens whose surprise is nearest to the entropy, as long as the mass before them is below p.

    Parameters
    ----------
    logits : ndarray of float64, shape (V,)
        Scores.
    p : float
        Share of the probability that is left, 0 to 1; 0 keeps the single nearest token, 1 keeps all.

    Returns
    -------
    ndarray, shape (V,)
        With all others removed. The most likely token may go, where its surprise is far below the entropy.

    Notes
    -----
    Surprise is ``-log(prob)``, and its expectation is the entropy. transformers keeps all tokens tied at the cut.

    References
    ----------
    Meister et al., "Locally Typical Sampling", 2023, section 4.1.
    """
    if p >= 1:
        return logits
    ids, values = left(logits)
    distance, weights = distances(values)
    wanted = p * weights.sum()
    head = min(_HEAD, len(ids))
    while True:
        near = largest(-distance, head)
        near = near[np.argsort(distance[near], kind="stable")]
        before = np.cumsum(weights[near]) - weights[near]
        kept = max(1, int(np.count_nonzero(before < wanted)))
        if kept < head or head == len(ids):
            return only(logits, ids[near[:kept]])
        head = min(_GROWTH * head, len(ids))


# ---- what steps need of arrays


@functools.lru_cache(maxsize=2)
def _all(V: int) -> Array:
    """Every id, made once: writing them costs more than the steps that need them."""
    ids = np.arange(V)
    ids.flags.writeable = False
    return ids


def left(logits: Array) -> tuple[Array, Array]:  # (V,) -> (n,), (n,)
    """Ids and logits of the tokens that have not been removed."""
    if logits.min() > -np.inf:
        return _all(len(logits)), logits
    ids = np.flatnonzero(logits > -np.inf)
    return ids, logits[ids]


def exp_below(logits: Array) -> Array:
    """Exponentials scaled so that the largest is 1: unnormalised probabilities."""
    out: Array = logits - logits.max()
    np.exp(out, out=out)  # in place: a second array of V numbers would cost more than their exponentials
    return out


def only(logits: Array, ids: Array) -> Array:
    """Remove all tokens but these."""
    out = np.full_like(logits, -np.inf)
    out[ids] = logits[ids]
    return out


def largest(values: Array, count: int) -> Array:
    """Places of the largest numbers, of equal numbers the first; in any order."""
    if count == len(values):
        return _all(count)
    groups = max(_GROUPS, 4 * count)
    rows = len(values) // groups
    if rows >= _ROWS:  # enough groups reach the floor, so all wanted numbers do
        highest = values[: rows * groups].reshape(rows, groups).max(axis=0)
        near = np.flatnonzero(values >= np.partition(highest, groups - count)[groups - count])
        if len(near) < len(values) // _ROWS:
            return near[largest(values[near], count)]
    border = np.partition(values, len(values) - count)[len(values) - count]
    tied = np.flatnonzero(values == border)
    above = np.flatnonzero(values > border)
    return np.concatenate([above, tied[: count - len(above)]])


def distances(logits: Array) -> tuple[Array, Array]:  # (n,) -> (n,), (n,)
    """Distance of each token's surprise from the entropy, and the probabilities."""
    log_probs = logits - logits.max()
    log_probs -= np.log(np.exp(log_probs).sum())
    probs = np.exp(log_probs)
    entropy = -(log_probs * probs).sum()
    return np.abs(log_probs + entropy), probs
