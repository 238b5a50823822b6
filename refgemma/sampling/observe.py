"""Look closely at one decision.

All that a record says follows from the logits, the settings, the tokens so far and u, so nothing of it needs to be
worked out while a text is generated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling.borders import CUTS, border, order_of
from refgemma.sampling.decision import GREEDY_BELOW, Decision, Stage, decide
from refgemma.sampling.entry import Candidate, Entry, StepRecord
from refgemma.sampling.near_tie import kind_of_near_tie, nearest_flip
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps.selection import exp_below, largest, left

SHOWN = 20  # candidates, the most likely before all steps

# A share of one that is lost in its rounding: no move of such a token's logit by a rounding is seen in the draw.
NO_PROBABILITY = 2.0**-53

# Steps whose changes are few enough to list.
_LISTED = ("logit_bias", "banned", "repetition_penalty", "frequency_penalty", "presence_penalty")


def observe(
    logits: Array,
    params: SamplingParams,
    prompt_tokens: Sequence[int],
    output_tokens: Sequence[int],
    u: float,
    token: int | None = None,
) -> Entry:
    """Make a decision, and say all that there is to know of it. logits (V,)."""
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
        near_tie=kind_of_near_tie(flip.size, size),
        size=size,
    )


def _step(stage: Stage, params: SamplingParams, before: Spread, after: Spread) -> StepRecord:
    """What one step did, of the arrays that went in and came out."""
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
            last, first = border(order, stays)
            assert first is not None, "something was removed"
            last, first, margin = int(before.ids[last]), int(before.ids[first]), float(order[last] - order[first])
    return StepRecord(
        name=stage.name,
        value=getattr(params, "typical_p" if stage.name == "typical" else stage.name),
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

    They are the token drawn, and of the candidates and the token that comes next those with probability after all
    steps; and that token, too, where it is now removed. So masks, such as -1e9 or the lowest float32, are left out.
    """
    ids = {decision.token, *(candidate.id for candidate in candidates if candidate.prob > NO_PROBABILITY)}
    if other is not None and not 0 < decision.probs[other] <= NO_PROBABILITY:
        ids.add(other)
    return float(max(abs(raw[i]) for i in ids))


def interval(decision: Decision, token: int) -> tuple[float, float] | None:
    """Where u must fall for a token."""
    place = int(np.searchsorted(decision.kept, token))
    if place == len(decision.kept) or decision.kept[place] != token:
        return None
    running = decision.running
    low = running[place - 1] if place else 0.0
    return float(low / running[-1]), float(running[place] / running[-1])


@dataclass(frozen=True, eq=False)
class Spread:
    """How probability is spread over the tokens that are left."""

    ids: Array  # (n,): Which they are, ascending
    values: Array  # (n,): Their logits, and shares of the probability, unnormalised
    weights: Array  # (n,): Their logits, and shares of the probability, unnormalised
    total: float  # sum of the shares
    log_total: float  # natural log of the sum of the exponentials of the logits
    entropy: float  # in nats


def spread(logits: Array) -> Spread:
    """Measure a distribution. logits (V,)."""
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
