"""The pure steps of sampling: logits in, logits out, removed tokens at minus infinity.

Every step takes float64 logits of shape (V,) and leaves that array alone; none draws, none keeps anything. Where
engines disagree, the docstring says what this one does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refgemma.numerics import Array


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
    scaled: Array = logits / value
    return scaled


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
    V = len(logits)
    if k >= V:
        return logits
    border = np.partition(logits, V - k)[V - k]  # the k-th largest
    tied = np.flatnonzero(logits == border)
    above = logits > border
    out = np.where(above, logits, -np.inf)
    stay = tied[: k - np.count_nonzero(above)]
    out[stay] = logits[stay]
    return out


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
    left = np.flatnonzero(logits > -np.inf)  # few, after top-k
    candidates = logits[left]
    weights = np.exp(candidates - candidates.max())
    wanted = p * weights.sum()
    # Sorting the whole vocabulary would cost more than the model's own head; a few candidates nearly always suffice.
    count = 64
    while True:
        order = _largest(candidates, count)
        before = np.cumsum(weights[order]) - weights[order]
        kept = max(1, int(np.count_nonzero(before < wanted)))
        if kept < len(order) or len(order) == len(candidates):
            break
        count *= 8
    stay = left[order[:kept]]
    out = np.full_like(logits, -np.inf)
    out[stay] = logits[stay]
    return out


def _largest(values: Array, count: int) -> Array:
    """Places of the `count` largest values and all that tie with the last of them, descending, lower places first."""
    if count >= len(values):
        ids = np.arange(len(values))
    else:
        ids = np.flatnonzero(values >= np.partition(values, len(values) - count)[len(values) - count])
    return ids[np.argsort(-values[ids], kind="stable")]
