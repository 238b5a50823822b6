"""One decision: logits pass the steps that are switched on, then one uniform number picks a token."""

from __future__ import annotations

import functools
import numbers
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from refgemma.errors import InputError, InputTypeError
from refgemma.numerics import Array
from refgemma.sampling import steps
from refgemma.sampling.params import SamplingParams

Step: TypeAlias = tuple[str, Callable[[Array], Array]]

# Below this temperature the division would overflow or change nothing; vLLM uses the same limit.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, eq=False)
class Stage:
    """What one step did; the tokens that it changed are looked up on demand.

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
        What each step changed; empty unless `record` was set.
    """

    token: int
    probs: Array
    kept: Array
    u: float
    running: Array
    stages: tuple[Stage, ...] = ()


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
        If token ids are not whole numbers, or `u` is not a number.
    """
    current, prompt_tokens, output_tokens = checked(logits, params, prompt_tokens, output_tokens)
    given: object = u
    if not isinstance(given, numbers.Real):
        raise InputTypeError(f"u is {u!r}: expected a number in [0, 1)")
    if not 0 <= u < 1:
        raise InputError(f"u is {u!r}: expected a number in [0, 1)")
    u, stages = float(u), []
    for name, step in steps_of(params, prompt_tokens, output_tokens):
        with np.errstate(over="ignore", invalid="ignore"):  # reported below
            changed = step(current)
        if not np.isfinite(changed.max()):
            raise InputError(f"{name} drives the logits out of the range of float64: expected a milder setting")
        if record:
            stages.append(Stage(name, current, changed))
        current = changed

    if params.temperature < GREEDY_BELOW:
        token = int(current.argmax())  # on ties the first, which has the lowest id
        probs = np.zeros_like(current)
        probs[token] = 1.0
        return Decision(token, probs, np.array([token]), u, np.ones(1), tuple(stages))
    kept, values = steps.left(current)
    probs = steps.exp_below(values)
    if len(kept) < len(current):
        among_kept, probs = probs, np.zeros_like(current)
        probs[kept] = among_kept
    probs /= probs.sum()
    running = np.cumsum(probs if len(kept) == len(probs) else probs[kept])
    return Decision(int(kept[draw(running, u)]), probs, kept, u, running, tuple(stages))


def steps_of(params: SamplingParams, prompt_tokens: Sequence[int], output_tokens: Sequence[int]) -> list[Step]:
    """List the steps that these settings switch on, in the order in which they act.

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
    Bias, ban; repetition, frequency, presence penalty; temperature; top-k, top-p, min-p, typical. With a window, the
    first penalty looks at the last tokens of prompt and output, the two others at the last of the output. For a greedy
    choice the list ends before the temperature, since nothing after it could change the choice.
    """
    window = slice(-params.penalty_window, None) if params.penalty_window else slice(None)
    read, written = [*prompt_tokens, *output_tokens][window], output_tokens[window]
    repetition, frequency, presence = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
    rows: list[tuple[Any, Callable[..., Array], dict[str, Any]]] = [
        (params.logit_bias, steps.logit_bias, {"biases": params.logit_bias}),
        (params.banned, steps.banned, {"tokens": params.banned}),
        (repetition != 1 and read, steps.repetition_penalty, {"tokens": read, "penalty": repetition}),
        (frequency and written, steps.frequency_penalty, {"output_tokens": written, "penalty": frequency}),
        (presence and written, steps.presence_penalty, {"output_tokens": written, "penalty": presence}),
    ]
    if params.temperature >= GREEDY_BELOW:
        rows += [
            (params.temperature != 1, steps.temperature, {"value": params.temperature}),
            (params.top_k is not None, steps.top_k, {"k": params.top_k}),
            (params.top_p is not None, steps.top_p, {"p": params.top_p}),
            (params.min_p is not None, steps.min_p, {"p": params.min_p}),
            (params.typical_p is not None, steps.typical, {"p": params.typical_p}),
        ]
    return [(step.__name__, functools.partial(step, **settings)) for on, step, settings in rows if on]


def setting_of(params: SamplingParams, step: str) -> Any:
    """Setting that a step goes by."""
    return getattr(params, "typical_p" if step == "typical" else step)


def draw(running: Array, u: float) -> int:
    """Place in the running sums that a uniform number picks."""
    return int(np.searchsorted(running, u * running[-1], side="right"))  # u < 1: never beyond the last


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


def seed_of(params: SamplingParams) -> int:
    """Seed of the settings, or a new one where they have none."""
    return int.from_bytes(os.urandom(4), "little") if params.seed is None else params.seed


# ---- checks


def checked(
    logits: Array, params: SamplingParams, prompt_tokens: Sequence[int], output_tokens: Sequence[int]
) -> tuple[Array, list[int], list[int]]:
    """Logits in float64, prompt and output as plain numbers, once they are known to be usable."""
    logits = np.asarray(logits)
    if logits.ndim != 1 or not logits.size or logits.dtype.kind not in "fiu":
        raise InputError(
            f"logits are {logits.dtype} of shape {logits.shape}: expected one number per vocabulary entry, (V,)"
        )
    wide = logits.astype(np.float64)
    highest = wide.max()
    if np.isnan(highest):
        raise InputError(f"logits hold NaN, first for token {int(np.isnan(wide).argmax())}: no token can be chosen")
    if np.isinf(highest):
        reason = "all minus infinity" if highest < 0 else f"plus infinity for token {int(wide.argmax())}"
        raise InputError(f"logits are {reason}: no token can be chosen")
    V = len(wide)
    prompt, output = check_ids("prompt_tokens", prompt_tokens, V), check_ids("output_tokens", output_tokens, V)
    check_ids("logit_bias", list(dict(params.logit_bias)), V)
    check_ids("banned", tuple(params.banned), V)
    return wide, prompt, output


def check_ids(name: str, tokens: Sequence[int], V: int) -> list[int]:
    """Token ids as plain numbers, once they are known to be in the vocabulary."""
    try:
        ids = [operator.index(token) for token in tokens]
    except TypeError:
        raise InputTypeError(f"{name} are {tokens!r:.60}: expected a list of token ids") from None
    for token in ids:
        if not 0 <= token < V:
            raise InputError(f"token id {token} of {name} is outside the vocabulary of {V} (ids from 0)")
    return ids
