"""What a record says of one decision: the candidates, what each step did to them, the draw, and how near it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One token on its way through the steps.

    Attributes
    ----------
    id : int
        The token.
    raw : float or None
        Its logit before all steps; None for minus infinity.
    raw_prob : float
        Its probability before all steps.
    logits : tuple of (float or None)
        Its logit after each step; None where it is removed.
    prob : float
        Its probability in the distribution that was drawn from.
    """

    id: int
    raw: float | None
    raw_prob: float
    logits: tuple[float | None, ...]
    prob: float


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one step did.

    Attributes
    ----------
    name : str
        The step.
    value : object
        Its setting.
    ids : tuple of int
        Tokens that a bias, a ban or a penalty changed; empty for the other steps.
    before, after : tuple of (float or None)
        Their logits, None for minus infinity.
    removed : int
        How many tokens it removed.
    mass : float
        Their probability, of what was left before the step.
    last_kept, first_removed : int or None
        Tokens on both sides of a cut; None where nothing was cut off.
    margin : float or None
        Between those two: difference of their logits, for "typical" of their distances from the entropy, in nats.
    log_total : float
        Natural log of the sum of ``exp(logit)`` after the step: ``exp(logit - log_total)`` is a probability.
    entropy : float
        After the step, in nats.
    """

    name: str
    value: Any
    ids: tuple[int, ...]
    before: tuple[float | None, ...]
    after: tuple[float | None, ...]
    removed: int
    mass: float
    last_kept: int | None
    first_removed: int | None
    margin: float | None
    log_total: float
    entropy: float


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One decision of a record.

    Attributes
    ----------
    t : int
        Which output token, from 0.
    token : int
        The token that was recorded.
    u : float
        The uniform number.
    drawn : int
        The token that these steps and `u` give; another one only if another engine chose `token`.
    interval : tuple of float or None
        Where `u` must fall for `token`, from the first number up to below the second: cumulative probabilities, ids
        ascending. None where `token` was removed.
    raw_logprob, logprob : float or None
        Natural log of the probability of `token`, before all steps and in the distribution that was drawn from; None
        for a probability of zero.
    raw_entropy, entropy : float
        Of these two distributions, in nats.
    rank : int
        How many tokens are more likely than `token` before all steps.
    kept : int
        How many tokens were left to draw from.
    candidates : tuple of Candidate
        The most likely before all steps, the token itself, and those on both sides of each cut; most likely first.
    steps : tuple of StepRecord
        In the order in which they acted.
    flip : float or None
        Smallest change of the raw logits, each by at most this, that gives another token than `drawn`; None where none
        was found: to first order, which is no proof. See `refgemma.sampling.near_tie`.
    flip_step : str or None
        Where: a cut, or "draw".
    flip_token : int or None
        Which token comes then.
    near_tie : {"float32", "bfloat16"} or None
        The finest format of which one rounding, at the size of these logits, is no less than `flip`.
    size : float
        Largest absolute raw logit of `drawn`, of `flip_token`, and of the candidates with a probability above 2**-53
        after all steps: masked tokens do not count.
    """

    t: int
    token: int
    u: float
    drawn: int
    interval: tuple[float, float] | None
    raw_logprob: float | None
    logprob: float | None
    raw_entropy: float
    entropy: float
    rank: int
    kept: int
    candidates: tuple[Candidate, ...]
    steps: tuple[StepRecord, ...]
    flip: float | None
    flip_step: str | None
    flip_token: int | None
    near_tie: str | None
    size: float

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as a line of a record file has them."""
        candidates, steps = ([dict(vars(part)) for part in parts] for parts in (self.candidates, self.steps))
        return {**vars(self), "candidates": candidates, "steps": steps}
