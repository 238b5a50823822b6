"""A decision in words: how a token came about, and why another one did not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import Array
from refgemma.sampling.decision import GREEDY_BELOW, Decision, Stage, setting_of
from refgemma.sampling.entry import Entry, StepRecord, interval
from refgemma.sampling.near_tie import CUTS, UNITS, last_and_first, order_of
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps import exp_below, left

Name: TypeAlias = Callable[[int], str]  # a token's readable name


def explain(entry: Entry, params: SamplingParams, name: Name) -> str:
    """How a token came about."""
    likely = "the most likely" if not entry.rank else f"number {entry.rank + 1} by likelihood"
    sentences = [
        f"Token {entry.t} is {name(entry.token)}, {likely} before all steps: probability "
        f"{_probability(entry.raw_logprob)} there, {_probability(entry.logprob)} after them.",
        *(_step(step, name) for step in entry.steps),
        _draw(entry, params, name),
        _near_tie(entry, name),
    ]
    return " ".join(sentences)


def why_not(token: int, logits: Array, decision: Decision, params: SamplingParams, recorded: int, name: Name) -> str:
    """Why another token than the one chosen did not come."""
    if not 0 <= token < len(logits):
        raise InputError(f"token id {token} is outside the vocabulary of {len(logits)} (ids from 0)")
    if token == decision.token:
        chosen = "" if token == recorded else f", but the record has {name(recorded)}"
        return f"{name(token)} is what these settings choose{chosen}."
    if logits[token] == -np.inf:
        return f"{name(token)} could not come: the model gave it minus infinity."
    sentences: list[str] = []
    for stage in decision.stages:
        before, after = stage.logits_before[token], stage.logits_after[token]
        if after == -np.inf:
            removal = _removal(stage, token, params, name)
            return " ".join([*sentences, f"{name(token)} was removed by {stage.name}: {removal}"])
        if stage.name != "temperature" and after != before:
            sentences.append(f"{stage.name} moved the logit of {name(token)} from {before:.6g} to {after:.6g}.")
    if params.temperature < GREEDY_BELOW:
        final = decision.stages[-1].logits_after if decision.stages else np.asarray(logits, dtype=np.float64)
        gap = final[decision.token] - final[token]
        how = f"its logit is {gap:.4g} below" if gap else "its logit is the same, but its id is higher than"
        sentences.append(f"{name(token)} was never removed, but {how} that of {name(decision.token)}, the highest.")
        return " ".join(sentences)
    low, high = interval(decision, token) or (0.0, 0.0)
    u = decision.u
    where, distance = ("below", low - u) if u < low else ("at or above the end of", u - high)
    sentences.append(
        f"{name(token)} was never removed and had probability {decision.probs[token]:.4g}, but u = {u:.8f} fell "
        f"{where} its interval from {low:.8f} to {high:.8f}, which is {distance:.3g} away."
    )
    return " ".join(sentences)


def span_text(span: tuple[float, float]) -> str:
    """Interval of the draw, as it is written in texts."""
    return f"[{span[0]:.8f}, {span[1]:.8f})"


def _step(step: StepRecord, name: Name) -> str:
    lost = f", {step.removed:,} of them to minus infinity" if step.removed else ""
    if step.name == "temperature":
        return f"temperature divided all logits by {step.value:g}{lost}."
    if step.name == "banned":
        gone = f"{counted(len(step.ids))}, with {percent(step.mass)} of the probability" if step.ids else "none"
        return f"banned removed {gone}."
    if step.name not in CUTS:
        setting = "" if step.name == "logit_bias" else f" {step.value:g}"
        moved = f"the logits of {counted(len(step.ids))}{lost}" if step.ids else "no logit"
        return f"{step.name}{setting} moved {moved}."
    if step.last_kept is None or step.first_removed is None:
        return f"{step.name} {step.value:g} removed none."
    unit = " nats further from the entropy" if step.name == "typical" else " lower"
    return (
        f"{step.name} {step.value:g} removed {counted(step.removed)}, with {percent(step.mass)} of the probability: "
        f"the last kept was {name(step.last_kept)}, the first removed {name(step.first_removed)}, "
        f"{step.margin:.3g}{unit}."
    )


def _draw(entry: Entry, params: SamplingParams, name: Name) -> str:
    foreign = f"another engine or other settings must have chosen {name(entry.token)}"
    if params.temperature < GREEDY_BELOW:
        if entry.token == entry.drawn:
            return "It had the highest logit."
        return f"But {name(entry.drawn)} had the highest logit: {foreign}."
    left = f"{counted(entry.kept)} were left" if entry.kept != 1 else "One token was left"
    left += f" (entropy {entry.entropy:.3f} nats, {entry.raw_entropy:.3f} before all steps), and u = {entry.u:.8f}"
    span = None if entry.interval is None else span_text(entry.interval)
    if entry.token == entry.drawn:
        return f"{left} fell into its interval {span}."
    reason = "which had been removed" if span is None else f"whose interval is {span}"
    return f"{left} gives {name(entry.drawn)}: {foreign}, {reason}."


def _near_tie(entry: Entry, name: Name) -> str:
    if entry.flip is None or entry.flip_token is None:
        return "No change of the logits was found that gives another token; the search is of first order, no proof."
    where = "the draw" if entry.flip_step == "draw" else entry.flip_step
    sentence = (
        f"The smallest change of the logits that gives another token is about {entry.flip:.3g}: then "
        f"{name(entry.flip_token)} comes, at {where}."
    )
    if entry.near_tie is None:
        return sentence
    return (
        f"{sentence} This is a near-tie: one rounding to {entry.near_tie} of logits of this size, {entry.size:.4g}, is "
        f"up to {UNITS[entry.near_tie] * entry.size:.3g}."
    )


def _removal(stage: Stage, token: int, params: SamplingParams, name: Name) -> str:
    """By how much a step removed a token."""
    if stage.name == "banned":
        return "it is banned."
    if stage.name not in CUTS:  # beyond float64
        return f"that drove its logit from {stage.logits_before[token]:.6g} to minus infinity."
    value = setting_of(params, stage.name)
    ids, logits = left(stage.logits_before)
    place = int(np.searchsorted(ids, token))
    order = order_of(stage.name, logits)
    last, _ = last_and_first(order, stage.logits_after[ids] > -np.inf)
    last_name = name(int(ids[last]))
    ahead = (order > order[place]) | ((order == order[place]) & (ids < token))
    if stage.name == "typical":
        short = (
            f"its surprise is {-order[place]:.4g} nats away from the entropy, that of the last kept, {last_name}, "
            f"{-order[last]:.4g}"
        )
    else:
        short = f"its logit is {order[last] - order[place]:.4g} below that of the last kept, {last_name}"
    if stage.name == "top_k":
        return f"it was number {np.count_nonzero(ahead) + 1} of those left, and the first {value} stay; {short}."
    weights = exp_below(logits)
    if stage.name == "min_p":
        return f"it was {weights[place]:.4g} times as likely as the most likely token, less than {value:g}; {short}."
    before = weights[ahead].sum() / weights.sum()
    return f"the mass before it was {before:.6g}, not below {value:g} but {before - value:.3g} more; {short}."


def _probability(logprob: float | None) -> str:
    return "0" if logprob is None else f"{np.exp(logprob):.5g}"


def counted(count: int) -> str:
    """A number of tokens."""
    return f"{count:,} token{'s' if count != 1 else ''}"


def percent(share: float) -> str:
    """A probability in three digits."""
    return f"{100 * share:.3g} %"
