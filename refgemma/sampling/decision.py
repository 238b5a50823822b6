"""One decision: logits pass the steps that are switched on, then one uniform number picks a token."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps
from refgemma.sampling.params import SamplingParams

Step: TypeAlias = tuple[str, Callable[[Array], Array]]

# Below this temperature the division would overflow or say nothing; vLLM draws the same line.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, eq=False)
class Stage:
    """What one step changed.

    Attributes
    ----------
    name : str
        The step.
    ids : ndarray of int, shape (n,)
        Tokens whose logit it changed.
    before, after : ndarray of float64, shape (n,)
        Their logits; minus infinity where it removed them.
    """

    name: str
    ids: Array
    before: Array
    after: Array


@dataclass(frozen=True, eq=False)
class Decision:
    """The token chosen, and from what.

    Attributes
    ----------
    token : int
        The choice.
    probs : ndarray of float64, shape (V,)
        Probabilities it was drawn from; zero for removed tokens, one-hot for a greedy choice.
    kept : ndarray of int
        Ids that were left, ascending.
    u : float
        The uniform number in [0, 1) that picked it.
    stages : tuple of Stage
        What each step changed; empty unless asked for.
    """

    token: int
    probs: Array
    kept: Array
    u: float
    stages: tuple[Stage, ...] = ()


def uniform(seed: int, index: int) -> float:
    """Number in [0, 1) that decides output token `index` of a sequence with this seed.

    Parameters
    ----------
    seed : int
        0 to 2**64 - 1.
    index : int
        Counts output tokens from 0.

    Returns
    -------
    float
        A function of the two alone: neither other rows nor earlier draws change it.

    References
    ----------
    Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011: the generator Philox, keyed by seed.

    Examples
    --------
    >>> [round(uniform(7, t), 8) for t in range(3)]
    [0.87207345, 0.08284269, 0.0141077]
    """
    return float(np.random.Generator(np.random.Philox(key=seed, counter=index)).random())


def steps_of(params: SamplingParams, prompt_tokens: Sequence[int], output_tokens: Sequence[int]) -> list[Step]:
    """Steps that these settings switch on, in the order in which they act.

    Parameters
    ----------
    params : SamplingParams
        The settings.
    prompt_tokens, output_tokens : sequence of int
        What has been read and written so far.

    Returns
    -------
    list of (str, callable)
        Each a name and a function of logits alone.
    """
    bind = functools.partial
    every = [*prompt_tokens, *output_tokens]
    chosen: list[Step] = []
    if params.repetition_penalty != 1 and every:
        step = bind(steps.repetition_penalty, tokens=every, penalty=params.repetition_penalty)
        chosen.append(("repetition_penalty", step))
    if params.frequency_penalty and output_tokens:
        step = bind(steps.frequency_penalty, output_tokens=output_tokens, penalty=params.frequency_penalty)
        chosen.append(("frequency_penalty", step))
    if params.presence_penalty and output_tokens:
        step = bind(steps.presence_penalty, output_tokens=output_tokens, penalty=params.presence_penalty)
        chosen.append(("presence_penalty", step))
    if params.temperature < GREEDY_BELOW:
        return chosen
    if params.temperature != 1:
        chosen.append(("temperature", bind(steps.temperature, value=params.temperature)))
    if params.top_k is not None:
        chosen.append(("top_k", bind(steps.top_k, k=params.top_k)))
    if params.top_p is not None:
        chosen.append(("top_p", bind(steps.top_p, p=params.top_p)))
    return chosen


def decide(
    logits: Array,
    params: SamplingParams,
    prompt_tokens: Sequence[int] = (),
    output_tokens: Sequence[int] = (),
    u: float = 0.5,
    *,
    record: bool = False,
) -> Decision:
    """Choose the next token.

    Parameters
    ----------
    logits : ndarray of float, shape (V,)
        Scores of the model; minus infinity for what may not be chosen.
    params : SamplingParams
        The settings; `seed`, `max_tokens` and `stop` play no part here.
    prompt_tokens, output_tokens : sequence of int
        What has been read and written so far, token ids in ``[0, V)``; the penalties look at it.
    u : float
        Uniform number in [0, 1) that picks the token.
    record : bool
        Whether to keep what each step changed.

    Returns
    -------
    Decision
        The token is the smallest id whose cumulative probability, ids ascending, exceeds `u` times their total.

    Raises
    ------
    ValueError
        If logits are empty, hold NaN or plus infinity, leave nothing to choose, or are driven out of range by the
        settings; or `u` or a token id is out of range.
    TypeError
        If token ids are no whole numbers.
    """
    current, u = _check(logits, u), float(u)
    prompt_tokens = _check_ids("prompt_tokens", prompt_tokens, len(current))
    output_tokens = _check_ids("output_tokens", output_tokens, len(current))
    stages = []
    for name, step in steps_of(params, prompt_tokens, output_tokens):
        with np.errstate(over="ignore", invalid="ignore"):  # said in words below
            changed = step(current)
        if not np.isfinite(changed.max()):
            raise ValueError(f"{name} drives the logits out of the range of float64: expected a milder setting")
        if record:
            ids = np.flatnonzero(changed != current)
            stages.append(Stage(name, ids, current[ids], changed[ids]))
        current = changed

    if params.temperature < GREEDY_BELOW:
        token = int(current.argmax())  # the first, that is the lowest id, on ties
        probs = np.zeros_like(current)
        probs[token] = 1.0
        return Decision(token, probs, np.array([token]), u, tuple(stages))
    weights = np.exp(current - current.max())
    probs = weights / weights.sum()
    kept = np.flatnonzero(current > -np.inf)
    cumulative = np.cumsum(probs[kept])
    picked = np.searchsorted(cumulative, u * cumulative[-1], side="right")
    token = int(kept[min(picked, len(kept) - 1)])
    return Decision(token, probs, kept, u, tuple(stages))


def _check(logits: Array, u: float) -> Array:
    """Logits in float64, or a sentence on what is wrong."""
    logits = np.asarray(logits)
    if logits.ndim != 1 or not logits.size or logits.dtype.kind not in "fiu":
        raise ValueError(
            f"logits are {logits.dtype} of shape {logits.shape}: expected one number per vocabulary entry, (V,)"
        )
    wide = logits.astype(np.float64)
    highest = wide.max()
    if np.isnan(highest):
        raise ValueError(f"logits hold NaN, first for token {int(np.isnan(wide).argmax())}: no token can be chosen")
    if np.isinf(highest):
        reason = "all minus infinity" if highest < 0 else f"plus infinity for token {int(wide.argmax())}"
        raise ValueError(f"logits are {reason}: no token can be chosen")
    if not 0 <= u < 1:
        raise ValueError(f"u is {u!r}: expected a number in [0, 1)")
    return wide


def _check_ids(name: str, tokens: Sequence[int], V: int) -> list[int]:
    """Token ids as plain numbers, or a sentence on what is wrong."""
    try:
        ids = [operator.index(token) for token in tokens]
    except TypeError:
        raise TypeError(f"{name} are {tokens!r:.60}: expected a list of token ids") from None
    for token in ids:
        if not 0 <= token < V:
            raise ValueError(f"token id {token} of {name} is outside the vocabulary of {V} (ids from 0)")
    return ids
