"""What a record says of one decision: the candidates, what each step did to them, the draw, and how near it was.

Everything follows from the logits, the settings, the tokens so far and u, so none of it is computed while a text is
generated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling.decision import GREEDY_BELOW, Decision, Stage, decide, setting_of
from refgemma.sampling.near_tie import CUTS, last_and_first, nearest_flip, order_of, rounding_of
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps import exp_below, largest, left

SHOWN = 20  # candidates: the most likely before all steps

# A probability lost when added to 1 in float64: rounding such a token's logit cannot show in the draw.
NO_PROBABILITY = 2.0**-53

# Steps whose changes are few enough to list.
_LISTED = ("logit_bias", "banned", "repetition_penalty", "frequency_penalty", "presence_penalty")


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
        was found: to first order, which is not a proof. See `refgemma.sampling.near_tie`.
    flip_step : str or None
        Where: a cut, or "draw".
    flip_token : int or None
        Which token comes then.
    near_tie : {"float32", "bfloat16"} or None
        The finest format in which one rounding, at the size of these logits, is at least `flip`.
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
        """Plain dicts, lists and numbers, as in a line of a record file.

        Returns
        -------
        dict
            The fields, by name.
        """
        candidates, steps = ([dict(vars(part)) for part in parts] for parts in (self.candidates, self.steps))
        return {**vars(self), "candidates": candidates, "steps": steps}


def observe(
    logits: Array,
    params: SamplingParams,
    prompt_tokens: Sequence[int],
    output_tokens: Sequence[int],
    u: float,
    token: int | None = None,
) -> Entry:
    """Make a decision and describe it."""
    decision = decide(logits, params, prompt_tokens, output_tokens, u, record=True)
    raw = decision.stages[0].logits_before if decision.stages else np.asarray(logits, dtype=np.float64)
    token = decision.token if token is None else token
    spreads = [spread(raw), *(spread(stage.logits_after) for stage in decision.stages)]
    steps = tuple(
        _step(stage, params, *around)
        for stage, around in zip(decision.stages, itertools.pairwise(spreads), strict=True)
    )
    borders = {i for step in steps for i in (step.last_kept, step.first_removed) if i is not None}
    raw_total, raw_entropy = spreads[0].log_total, spreads[0].entropy
    candidates = _candidates(raw, raw_total, decision, {token, decision.token, *borders})
    flip = nearest_flip(raw, params, decision)
    size = _size(raw, decision, candidates, flip.token)
    return Entry(
        t=len(output_tokens),
        token=token,
        u=decision.u,
        drawn=decision.token,
        interval=interval(decision, token),
        raw_logprob=_finite(raw[token] - raw_total),
        logprob=math.log(decision.probs[token]) if decision.probs[token] else None,
        raw_entropy=raw_entropy,
        entropy=0.0 if params.temperature < GREEDY_BELOW else spreads[-1].entropy,
        rank=int(np.count_nonzero(raw > raw[token])),
        kept=len(decision.kept),
        candidates=candidates,
        steps=steps,
        flip=_finite(flip.size),
        flip_step=flip.step if flip.token is not None else None,
        flip_token=flip.token,
        near_tie=rounding_of(flip.size, size),
        size=size,
    )


def _step(stage: Stage, params: SamplingParams, before: Spread, after: Spread) -> StepRecord:
    listed = stage.ids if stage.name in _LISTED else np.arange(0)
    removed = len(before.ids) - len(after.ids)
    last = first = margin = None
    mass = 0.0
    if removed:
        whole = len(before.ids) == len(stage.logits_after)
        stays = (stage.logits_after if whole else stage.logits_after[before.ids]) > -np.inf
        gone = before.weights.copy()
        np.copyto(gone, 0, where=stays)
        mass = float(gone.sum() / before.total)
        if stage.name in CUTS:
            order = order_of(stage.name, before.values)
            last, first = last_and_first(order, stays)
            assert first is not None, "something was removed"
            last, first, margin = int(before.ids[last]), int(before.ids[first]), float(order[last] - order[first])
    return StepRecord(
        name=stage.name,
        value=setting_of(params, stage.name),
        ids=tuple(listed.tolist()),
        before=_finite_all(stage.logits_before[listed]),
        after=_finite_all(stage.logits_after[listed]),
        removed=removed,
        mass=mass,
        last_kept=last,
        first_removed=first,
        margin=margin,
        log_total=after.log_total,
        entropy=after.entropy,
    )


def _candidates(raw: Array, raw_total: float, decision: Decision, others: set[int]) -> tuple[Candidate, ...]:
    """The most likely tokens before all steps, and these others."""
    ids = sorted({*largest(raw, min(SHOWN, len(raw))).tolist(), *others}, key=lambda i: (-raw[i], i))
    return tuple(
        Candidate(
            id=i,
            raw=_finite(raw[i]),
            raw_prob=float(np.exp(raw[i] - raw_total)),
            logits=tuple(_finite(stage.logits_after[i]) for stage in decision.stages),
            prob=float(decision.probs[i]),
        )
        for i in ids
    )


def _size(raw: Array, decision: Decision, candidates: Sequence[Candidate], other: int | None) -> float:
    """Largest absolute raw logit of those whose rounding can matter.

    These are the token drawn, the token of the nearest flip, even if a cut removes it now, and the candidates, where
    they have any probability. So masks, such as -1e9 or the lowest float32, do not count.
    """
    ids = {decision.token, *(candidate.id for candidate in candidates if candidate.prob > NO_PROBABILITY)}
    if other is not None and not 0 < decision.probs[other] <= NO_PROBABILITY:
        ids.add(other)
    return float(max(abs(raw[i]) for i in ids))


def interval(decision: Decision, token: int) -> tuple[float, float] | None:
    """Where u must fall for a token: from the first number up to below the second; None where it was removed."""
    place = int(np.searchsorted(decision.kept, token))
    if place == len(decision.kept) or decision.kept[place] != token:
        return None
    running = decision.running
    low = running[place - 1] if place else 0.0
    return float(low / running[-1]), float(running[place] / running[-1])


@dataclass(frozen=True, eq=False)
class Spread:
    """How probability is spread over the tokens that are left."""

    ids: Array  # (n,), ascending
    values: Array  # (n,), logits
    weights: Array  # (n,), unnormalised probabilities
    total: float  # sum of the weights
    log_total: float  # natural log of the sum of exp(logit)
    entropy: float  # in nats


def spread(logits: Array) -> Spread:
    ids, values = left(logits)
    weights = exp_below(values)
    total = float(weights.sum())
    log_total = float(values.max() + math.log(total))
    entropy = max(0.0, log_total - float((weights * values).sum() / total))
    return Spread(ids, values, weights, total, log_total, entropy)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _finite_all(values: Array) -> tuple[float | None, ...]:
    return tuple(map(_finite, values.tolist()))
