"""A decision in words: how a token came about, and why another one did not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from refgemma.errors import InputError
from refgemma.sampling.borders import CUTS, border, order_of
from refgemma.sampling.decision import GREEDY_BELOW, Decision, Stage
from refgemma.sampling.entry import Entry, StepRecord
from refgemma.sampling.near_tie import UNITS
from refgemma.sampling.observe import interval
from refgemma.sampling.steps.selection import exp_below, left

if TYPE_CHECKING:
    from refgemma.sampling.record import Record


def explain(record: Record, t: int) -> str:
    """Tell how a token came about."""
    entry = record[t]
    likely = "the most likely" if not entry.rank else f"number {entry.rank + 1} by likelihood"
    sentences = [
        f"Token {t} is {record.text(entry.token)}, {likely} before all steps: probability "
        f"{_probability(entry.raw_logprob)} there, {_probability(entry.logprob)} after them.",
        *(_told(record, step) for step in entry.steps),
        _draw_told(record, entry),
        _near_tie_told(record, entry),
    ]
    return " ".join(sentences)


def why_not(record: Record, t: int, token: int) -> str:
    """Tell why another token did not come."""
    if not 0 <= token < record.vocab_size:
        raise InputError(f"token id {token} is outside the vocabulary of {record.vocab_size} (ids from 0)")
    decision, name = record.decision(t), record.text(token)
    if token == decision.token:
        chosen = "" if token == record.tokens[t] else f", but the record has {record.text(record.tokens[t])}"
        return f"{name} is what these settings choose{chosen}."
    if record.logits[t][token] == -np.inf:
        return f"{name} could not come: the model gave it minus infinity."
    sentences: list[str] = []
    for stage in decision.stages:
        before, after = stage.logits_before[token], stage.logits_after[token]
        if after == -np.inf:
            return " ".join([*sentences, f"{name} was removed by {stage.name}: {_removal(record, stage, token)}"])
        if stage.name != "temperature" and after != before:
            sentences.append(f"{stage.name} moved the logit of {name} from {before:.6g} to {after:.6g}.")
    if record.params.temperature < GREEDY_BELOW:
        return " ".join([*sentences, _beaten(record, t, decision, token)])
    low, high = interval(decision, token) or (0.0, 0.0)
    where = "below" if decision.u < low else "at or above the end of"
    return " ".join(
        [
            *sentences,
            f"{name} was never removed and had probability {decision.probs[token]:.4g}, but u = {decision.u:.8f} fell "
            f"{where} its interval from {low:.8f} to {high:.8f}, which is {_distance(decision.u, low, high):.3g} away.",
        ]
    )


def _told(record: Record, step: StepRecord) -> str:
    """What one step did, in a sentence."""
    lost = f", {step.removed:,} of them to minus infinity" if step.removed else ""
    if step.name == "temperature":
        return f"temperature divided all logits by {step.value:g}{lost}."
    if step.name == "banned":
        gone = f"{_count(len(step.ids))}, with {_percent(step.mass)} of the probability" if step.ids else "none"
        return f"banned removed {gone}."
    if step.name not in CUTS:
        name = step.name if step.name == "logit_bias" else f"{step.name} {step.value:g}"
        return f"{name} moved {f'the logits of {_count(len(step.ids))}{lost}' if step.ids else 'no logit'}."
    if step.last_kept is None or step.first_removed is None:
        return f"{step.name} {step.value:g} removed none."
    unit = " nats further from the entropy" if step.name == "typical" else " lower"
    return (
        f"{step.name} {step.value:g} removed {_count(step.removed)}, with {_percent(step.mass)} of the probability: "
        f"the last kept was {record.text(step.last_kept)}, the first removed {record.text(step.first_removed)}, "
        f"{step.margin:.3g}{unit}."
    )


def _draw_told(record: Record, entry: Entry) -> str:
    if record.params.temperature < GREEDY_BELOW:
        if entry.token == entry.drawn:
            return "It had the highest logit."
        return (
            f"But {record.text(entry.drawn)} had the highest logit: another engine or other settings must have chosen "
            f"{record.text(entry.token)}."
        )
    left = f"{_count(entry.kept)} were left" if entry.kept != 1 else "One token was left"
    left += f" (entropy {entry.entropy:.3f} nats, {entry.raw_entropy:.3f} before all steps)"
    if entry.token != entry.drawn:
        reason = (
            "which had been removed" if entry.interval is None else f"whose interval is {span_text(entry.interval)}"
        )
        return (
            f"{left}, and u = {entry.u:.8f} gives {record.text(entry.drawn)}: another engine or other settings must "
            f"have chosen {record.text(entry.token)}, {reason}."
        )
    assert entry.interval is not None, "a token that was drawn had been kept"
    return f"{left}, and u = {entry.u:.8f} fell into its interval {span_text(entry.interval)}."


def _near_tie_told(record: Record, entry: Entry) -> str:
    if entry.flip is None or entry.flip_token is None:
        return "No change of the logits was found that gives another token; the search is of first order, no proof."
    where = "the draw" if entry.flip_step == "draw" else entry.flip_step
    told = (
        f"The smallest change of the logits that gives another token is about {entry.flip:.3g}: then "
        f"{record.text(entry.flip_token)} comes, at {where}."
    )
    if entry.near_tie is None:
        return told
    return (
        f"{told} This is a near-tie: one rounding to {entry.near_tie} of logits of this size, {entry.size:.4g}, is up "
        f"to {UNITS[entry.near_tie] * entry.size:.3g}."
    )


def _removal(record: Record, stage: Stage, token: int) -> str:
    """By how much a step removed a token."""
    if stage.name == "banned":
        return "it is banned."
    if stage.name not in CUTS:  # beyond float64
        return f"that drove its logit from {stage.logits_before[token]:.6g} to minus infinity."
    name, value = stage.name, getattr(record.params, "typical_p" if stage.name == "typical" else stage.name)
    ids, logits = left(stage.logits_before)
    place = int(np.searchsorted(ids, token))
    order = order_of(name, logits)
    kept = stage.logits_after[ids] > -np.inf
    last = border(order, kept)[0]
    ahead = (order > order[place]) | ((order == order[place]) & (ids < token))
    if name == "typical":
        short = (
            f"its surprise is {-order[place]:.4g} nats away from the entropy, that of the last kept, "
            f"{record.text(int(ids[last]))}, {-order[last]:.4g}"
        )
    else:
        gap = order[last] - order[place]
        short = f"its logit is {gap:.4g} below that of the last kept, {record.text(int(ids[last]))}"
    if name == "top_k":
        return f"it was number {np.count_nonzero(ahead) + 1} of those left, and the first {value} stay; {short}."
    weights = exp_below(logits)
    if name == "min_p":
        return f"it was {weights[place]:.4g} times as likely as the most likely token, less than {value:g}; {short}."
    before = weights[ahead].sum() / weights.sum()
    return f"the mass before it was {before:.6g}, not below {value:g} but {before - value:.3g} more; {short}."


def _beaten(record: Record, t: int, decision: Decision, token: int) -> str:
    """Why the greedy choice was another one."""
    final = decision.stages[-1].logits_after if decision.stages else np.asarray(record.logits[t], dtype=np.float64)
    gap = final[decision.token] - final[token]
    how = f"its logit is {gap:.4g} below" if gap else "its logit is the same, but its id is higher than"
    return f"{record.text(token)} was never removed, but {how} that of {record.text(decision.token)}, the highest."


def _probability(logprob: float | None) -> str:
    return "0" if logprob is None else f"{np.exp(logprob):.5g}"


def _count(count: int) -> str:
    return f"{count:,} token{'s' if count != 1 else ''}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def span_text(span: tuple[float, float]) -> str:
    """Interval of the draw, as it is written in texts."""
    return f"[{span[0]:.8f}, {span[1]:.8f})"


def _distance(u: float, low: float, high: float) -> float:
    return low - u if u < low else u - high
