"""One decision: logits pass the steps that are switched on, then one uniform number picks a token."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import Array
from refgemma.sampling import steps
from refgemma.sampling.checks import check_ids, check_logits
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps.selection import exp_below, left

Step: TypeAlias = tuple[str, Callable[[Array], Array]]

# Below this temperature the division would overflow or say nothing; vLLM draws the same line.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, eq=False)
class Stage:
    """What one step did; what it changed is looked for only when asked.

    Attributes
    ----------
    name : str
        The step.
    logits_before, logits_after : ndarray of float64, shape (V,)
        What went in and what came out; minus infinity for removed tokens.
    """

    name: str
    logits_before: Array
    logits_after: Array

    @functools.cached_property
    def ids(self) -> Array:
        """Tokens whose logit it changed, ascending."""
        return np.flatnonzero(self.logits_after != self.logits_before)

    @property
    def before(self) -> Array:
        """Their logits, going in."""
        return self.logits_before[self.ids]

    @property
    def after(self) -> Array:
        """Their logits, coming out; minus infinity where it removed them."""
        return self.logits_after[self.ids]


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
    running : ndarray of float64, shape (n,)
        Running sums of the probabilities of the n tokens in `kept`.
    stages : tuple of Stage
        What each step changed; empty unless asked for.
    """

    token: int
    probs: Array
    kept: Array
    u: float
    running: Array
    stages: tuple[Stage, ...] = ()


def seed_of(params: SamplingParams) -> int:
    """Seed of the settings, or a new one where they have none."""
    return int.from_bytes(os.urandom(4), "little") if params.seed is None else params.seed


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

    Notes
    -----
    Bias, ban; repetition, frequency, presence penalty; temperature; top-k, top-p, min-p, typical. A window has the
    first penalty look at the last tokens of prompt and output, the two others at the last of the output. Without a
    temperature, what follows it could not change the choice, and is left out.
    """
    window = slice(-params.penalty_window, None) if params.penalty_window else slice(None)
    read, written = [*prompt_tokens, *output_tokens][window], output_tokens[window]
    chosen: list[Step] = []

    def add(step: Callable[..., Array], *settings: Any) -> None:
        chosen.append((step.__name__, lambda logits: step(logits, *settings)))

    if params.logit_bias:
        add(steps.logit_bias, params.logit_bias)
    if params.banned:
        add(steps.banned, params.banned)
    if params.repetition_penalty != 1 and read:
        add(steps.repetition_penalty, read, params.repetition_penalty)
    if params.frequency_penalty and written:
        add(steps.frequency_penalty, written, params.frequency_penalty)
    if params.presence_penalty and written:
        add(steps.presence_penalty, written, params.presence_penalty)
    if params.temperature < GREEDY_BELOW:
        return chosen
    if params.temperature != 1:
        add(steps.temperature, params.temperature)
    if params.top_k is not None:
        add(steps.top_k, params.top_k)
    if params.top_p is not None:
        add(steps.top_p, params.top_p)
    if params.min_p is not None:
        add(steps.min_p, params.min_p)
    if params.typical_p is not None:
        add(steps.typical, params.typical_p)
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
        If token ids are no whole numbers, or `u` is no number.
    """
    current, u = check_logits(logits, u), float(u)
    prompt_tokens = check_ids("prompt_tokens", prompt_tokens, len(current))
    output_tokens = check_ids("output_tokens", output_tokens, len(current))
    check_ids("logit_bias", list(dict(params.logit_bias)), len(current))
    check_ids("banned", tuple(params.banned), len(current))
    stages = []
    for name, step in steps_of(params, prompt_tokens, output_tokens):
        with np.errstate(over="ignore", invalid="ignore"):  # said in words below
            changed = step(current)
        if not np.isfinite(changed.max()):
            raise InputError(f"{name} drives the logits out of the range of float64: expected a milder setting")
        if record:
            stages.append(Stage(name, current, changed))
        current = changed

    if params.temperature < GREEDY_BELOW:
        token = int(current.argmax())  # the first, that is the lowest id, on ties
        probs = np.zeros_like(current)
        probs[token] = 1.0
        return Decision(token, probs, np.array([token]), u, np.ones(1), tuple(stages))
    kept, values = left(current)
    probs = exp_below(values)
    if len(kept) < len(current):
        among_kept, probs = probs, np.zeros_like(current)
        probs[kept] = among_kept
    probs /= probs.sum()
    running = np.cumsum(probs if len(kept) == len(probs) else probs[kept])
    return Decision(int(kept[draw(running, u)]), probs, kept, u, running, tuple(stages))


def draw(running: Array, u: float) -> int:
    """Place that a uniform number picks. running (n,)."""
    return int(np.searchsorted(running, u * running[-1], side="right"))  # u < 1: never beyond the last
