"""Adjustments: steps that change single logits. Bias and bans, the three penalties, and the temperature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import Array


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
        Minus infinity in their places.

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
    scaled: Array = logits / value
    return scaled
