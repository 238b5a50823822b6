"""Cuts: steps that remove tokens and leave the logits of all others as they are.

Each keeps the head of a list: top-k, top-p and min-p of the tokens from the most likely down, typical of the tokens
from the least distant up. Of tokens tied at the border the lower ids stay, but for min-p, which keeps them all.
"""

from __future__ import annotations

import math

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling.steps.selection import exp_below, largest, left, only

# Sorting the whole vocabulary would cost more than all else here; the head that is looked at first nearly always
# suffices, and grows by this factor where it does not.
_HEAD, _GROWTH = 1024, 16


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
        With all others removed. Of tokens tied at the border the lower ids stay.

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
        With all others removed. Of tokens tied at the border the lower ids stay.

    Notes
    -----
    At equality the walk stops: with probabilities .5, .25, .125, .125 and p = .75 two tokens stay. gemma_pytorch and
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
    """Keep the tokens whose surprise is nearest to what is to be expected, as long as the mass before them is below p.

    Parameters
    ----------
    logits : ndarray of float64, shape (V,)
        Scores.
    p : float
        Share of the probability that is left, 0 to 1; 0 keeps the single nearest token, 1 keeps all.

    Returns
    -------
    ndarray, shape (V,)
        With all others removed. Of tokens equally near at the border the lower ids stay. The most likely token may go,
        where it is less of a surprise than the others are on average.

    Notes
    -----
    Surprise is ``-log(prob)``, its expectation the entropy; `distances` has the difference. transformers keeps all
    tokens that tie at the border.

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


def distances(logits: Array) -> tuple[Array, Array]:
    """How far the surprise of each token is from the entropy. logits (n,) -> distance (n,), probs (n,)."""
    log_probs = logits - logits.max()
    log_probs -= np.log(np.exp(log_probs).sum())
    probs = np.exp(log_probs)
    entropy = -(log_probs * probs).sum()
    return np.abs(log_probs + entropy), probs
