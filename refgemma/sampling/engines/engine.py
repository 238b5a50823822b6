"""An engine: a name, a source, and the list of steps that its settings switch on; and what engines share.

Scores start as logits in float32; a removed token is minus infinity. After a step named ``softmax`` the scores are
probabilities, not yet divided by their sum, and a removed token is still minus infinity.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import Array, from_bfloat16, to_bfloat16
from refgemma.sampling.decision import Step, setting_of
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps import exp_below, only

LogitsDtype: TypeAlias = Literal["float32", "float16", "bfloat16"]

# The values with which a setting does nothing; any other switches a step on.
OFF: dict[str, tuple[object, ...]] = {
    "repetition_penalty": (1.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "penalty_window": (None,),
    "temperature": (1.0,),
    "logit_bias": ((),),
    "banned": ((),),
    "top_k": (None,),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
}


class Refused(InputError):
    """An engine does not take these settings, or gets no probabilities from them."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an engine may use, besides logits and settings, to choose its steps."""

    prompt: Sequence[int]  # what has been read
    output: Sequence[int]  # what has been written
    V: int
    logits_dtype: LogitsDtype = "float32"  # in which the model gave the logits, kept here in a wider format


StepsOf: TypeAlias = Callable[[SamplingParams, Context], list[Step]]


@dataclass(frozen=True)
class Engine:
    """One engine's way from logits to a distribution."""

    name: str  # what users call it
    source: str  # repository, version and file that the steps were read from
    steps: StepsOf  # lists the steps that act, in order, or refuses the settings
    dtype: type[np.floating[Any]] = np.float32  # of scores and probabilities; steps may round to a narrower format
    total: type[np.floating[Any]] = np.float32  # in which the probabilities of the kept tokens are summed at the end


@dataclass(frozen=True, eq=False)
class State:
    """Scores after one step."""

    name: str  # of the step; ``logits`` for the input
    rule: str  # what the step does, in a sentence, and its setting
    logits: Array  # (V,), the last scores that were logits
    scores: Array  # (V,), logits or, after the step ``softmax``, probabilities; removed tokens are minus infinity
    weights: Array  # (V,), unnormalised probabilities; 0 for removed tokens

    @property
    def kept(self) -> Array:
        """Ids that are left, ascending."""
        return np.flatnonzero(self.scores > -np.inf)


@dataclass(frozen=True, eq=False)
class Distribution:
    """What an engine would draw from."""

    engine: str  # its name
    kept: Array  # ids that are left, ascending
    probs: Array  # (V,), in the engine's format; 0 for removed tokens
    states: tuple[State, ...]  # the input, then the scores after each step


# ---- from a table of steps to the steps of one decision


def engine_of(
    name: str,
    source: str,
    order: Mapping[str, Callable[..., Array]],
    refusal: Callable[[SamplingParams, Context], str] | None = None,
) -> Engine:
    """Engine whose steps are a table in the order in which they act; what the table lacks is refused.

    `refusal` says in a sentence why settings are refused for another reason, or gives an empty text.
    """

    def steps(params: SamplingParams, context: Context) -> list[Step]:
        refuse(name, params, order, refusal(params, context) if refusal else "")
        return steps_in(order, params, context)

    return Engine(name, source, steps)


def refuse(name: str, params: SamplingParams, known: Iterable[str], reason: str = "") -> None:
    """Raise for a reason, or where a setting is on whose step the engine does not have."""
    if reason:
        raise Refused(reason)
    for setting in OFF:
        if is_on(params, setting) and setting.replace("typical_p", "typical") not in known:
            value = getattr(params, setting)
            raise Refused(f"{name} has no {setting} (given {value!r}): leave it at {OFF[setting][0]!r}")


def is_on(params: SamplingParams, setting: str) -> bool:
    """Whether a setting switches a step on."""
    return getattr(params, setting) not in OFF[setting]


def steps_in(order: Mapping[str, Callable[..., Array]], params: SamplingParams, context: Context) -> list[Step]:
    """Steps of a table that are on; the one called softmax always acts, and a temperature of 0 ends in a greedy choice.

    A step is given what its parameters name: `tokens` for the penalties are prompt and output, and one that is not
    known here is the setting itself.
    """
    history = [*context.prompt, *context.output]
    given = {
        "tokens": history,
        "output_tokens": context.output,
        "dtype": context.logits_dtype,
        "frequency": params.frequency_penalty,
        "presence": params.presence_penalty,
    }
    chosen: list[Step] = []
    for name, step in order.items():
        if name == "softmax":
            chosen.append((name, step))
            continue
        if name == "temperature" and params.temperature == 0:
            return [*chosen, ("greedy", first_maximum)]
        without_tokens = name == "repetition_penalty" and not history
        without_output = name in ("frequency_penalty", "presence_penalty") and not context.output
        if is_on(params, name.replace("typical", "typical_p")) and not (without_tokens or without_output):
            value = setting_of(params, name)
            own = given | {"tokens": value} if name == "banned" else given
            names = list(inspect.signature(step).parameters)[1:]
            chosen.append((name, partial(step, **{n: own.get(n, value) for n in names})))
    return chosen


# ---- running them


def run(engine: Engine, logits: Array, params: SamplingParams, context: Context) -> Distribution:
    """Scores after each step, and the distribution that the last one leaves."""
    steps = engine.steps(params, context)
    with np.errstate(all="ignore"):  # overflow and 0 / 0 are reported below
        scores = logits.astype(engine.dtype)
        given = engine.dtype.__name__ if context.logits_dtype == "float32" else context.logits_dtype
        states = [State("logits", f"As given, in {given}", scores, scores, exp_below(scores))]
        for name, step in steps:
            scores, before = step(scores), states[-1]
            if name == "softmax" or before.scores is not before.logits:
                weights = np.maximum(scores, 0)  # which takes removed tokens to 0, and passes NaN on
                states.append(State(name, rule(name, step, params), before.logits, scores, weights))
            else:
                states.append(State(name, rule(name, step, params), scores, scores, exp_below(scores)))
        for state in states:
            if not 0 < state.weights.sum() < np.inf:
                raise Refused(f"{engine.name} gets no finite probabilities from its step {state.name}: {state.rule}")
        weights = states[-1].weights
        probs = (weights / weights.sum(dtype=engine.total)).astype(engine.dtype)
    return Distribution(engine.name, states[-1].kept, probs, tuple(states))


def rule(name: str, step: Callable[[Array], Array], params: SamplingParams) -> str:
    """Sentence on what a step does: the summary of its docstring, and its setting."""
    summary = (inspect.getdoc(getattr(step, "func", step)) or "").partition("\n")[0].rstrip(".")
    setting = setting_of(params, name) if name not in ("softmax", "greedy") else None
    return f"{summary} ({name} = {setting:g})" if isinstance(setting, (int, float)) else summary


# ---- shared steps


def rounded(x: Array, dtype: str) -> Array:
    """Round float32 to the numbers of a format."""
    if dtype == "bfloat16":
        return from_bfloat16(to_bfloat16(x))
    with np.errstate(over="ignore"):
        return x.astype(dtype).astype(np.float32, copy=False)


def softmax(logits: Array) -> Array:
    """Turn logits into probabilities."""
    weights = exp_below(logits)
    return np.where(logits > -np.inf, weights / weights.sum(), -np.inf).astype(logits.dtype, copy=False)


def first_maximum(logits: Array) -> Array:
    """Keep the most likely token alone, on ties the lowest id."""
    return only(logits, np.array([logits.argmax()]))
