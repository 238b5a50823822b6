"""Decide again from a record: with the same settings the same tokens, with others the first that differs, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refgemma.errors import InputError
from refgemma.sampling.decision import GREEDY_BELOW, decide, uniform
from refgemma.sampling.explain import span_text, why_not
from refgemma.sampling.observe import interval
from refgemma.sampling.params import SamplingParams

if TYPE_CHECKING:
    from refgemma.sampling.record import Record

_NO_PART = ("max_tokens", "stop")


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of deciding again.

    Attributes
    ----------
    params : SamplingParams
        The settings it was done with.
    tokens : tuple of int
        Up to the first that differs, that one included.
    first_difference : int or None
        Its index; None where all tokens come out as recorded.
    reason : str
        What differs and why, in words.
    """

    params: SamplingParams
    tokens: tuple[int, ...]
    first_difference: int | None
    reason: str


def replay(record: Record, changes: Mapping[str, Any]) -> Replay:
    """Decide again, up to the first token that differs."""
    params = _changed(record.params, changes)
    tokens: list[int] = []
    for t, (logits, recorded, u) in enumerate(zip(record.logits, record.tokens, record.uniforms, strict=True)):
        if "seed" in changes:
            u = uniform(changes["seed"], t)
        token = decide(logits, params, record.prompt_tokens, record.tokens[:t], u).token
        tokens.append(token)
        if token != recorded:
            uniforms = (*record.uniforms[:t], u, *record.uniforms[t + 1 :])
            other = dataclasses.replace(record, params=params, uniforms=uniforms)
            return Replay(params=params, tokens=tuple(tokens), first_difference=t, reason=_reason(record, other, t))
    same = f"All {len(tokens)} tokens come out as recorded{_with(record.params, params)}."
    return Replay(params=params, tokens=tuple(tokens), first_difference=None, reason=same)


def _changed(params: SamplingParams, changes: Mapping[str, Any]) -> SamplingParams:
    known = [field.name for field in dataclasses.fields(params) if field.name not in _NO_PART]
    for name in changes:
        if name in _NO_PART:
            raise InputError(f"{name} plays no part in a decision: a replay takes {', '.join(known)}")
        if name not in known:
            raise InputError(f"{name} is no setting: a replay takes {', '.join(known)}")
    if "seed" in changes and changes["seed"] is None:
        raise InputError("seed is None: a replay needs a number, or no seed at all for the recorded uniform numbers")
    return dataclasses.replace(params, **changes)


def _reason(record: Record, other: Record, t: int) -> str:
    """What differs at this token, `other` being the record with the settings replaced."""
    was, now = record.tokens[t], other.decision(t).token
    then = record.decision(t)
    differs = f"Token {t} is {record.text(now)} and not {record.text(was)}"
    foreign = f"another engine or other settings must have chosen {record.text(was)}"
    if then.token == now:
        sentences = [f"{differs}, with the recorded settings already: {foreign}.", why_not(record, t, was)]
    else:
        sentences = [f"{differs}{_with(record.params, other.params)}."]
        if then.token != was:
            sentences.append(f"The recorded settings give neither but {record.text(then.token)}: {foreign}.")
        if interval(other.decision(t), was) is None or other.params.temperature < GREEDY_BELOW:
            sentences.append(why_not(other, t, was))
        elif interval(then, now) is None:
            sentences.append(f"In the record, {why_not(record, t, now)}")
        else:
            sentences.append(_shift(record, other, t, was, now))
    if t + 1 < len(record):
        sentences.append(
            "The logits recorded after it follow the recorded token, not this one, so they say nothing of how the text "
            "would go on."
        )
    return " ".join(sentences)


def _shift(record: Record, other: Record, t: int, was: int, now: int) -> str:
    """Both tokens were there both times: an interval or the uniform number moved."""
    before, after = interval(record.decision(t), was), interval(other.decision(t), was)
    new = interval(other.decision(t), now)
    assert after is not None, "it is still kept"
    assert new is not None, "it was drawn"
    moved = f"moved from {span_text(before)} to" if before is not None and before != after else "is"
    u, own = record.uniforms[t], other.uniforms[t]
    number = f"u = {own:.8f}" if own == u else f"u is now {own:.8f}, no longer {u:.8f}, and"
    return (
        f"The interval of {record.text(was)} {moved} {span_text(after)}; {number} falls into {span_text(new)}, that of "
        f"{record.text(now)}."
    )


def _with(old: SamplingParams, new: SamplingParams) -> str:
    """The settings that differ, as a clause."""
    names = [field.name for field in dataclasses.fields(old) if getattr(old, field.name) != getattr(new, field.name)]
    clauses = [f"{name} {getattr(new, name)} in place of {getattr(old, name)}" for name in names]
    return f" with {' and '.join(clauses)}" if clauses else ""
