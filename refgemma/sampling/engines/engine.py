"""What an engine is here: a name, a source, and the list of steps that its settings switch on.

Scores start as logits in float32; a removed token is minus infinity. After a step named ``softmax`` the scores are
probabilities, not yet divided by their sum; a removed token is minus infinity there, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling.decision import Step
from refgemma.sampling.engines.parts import Refused
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps.selection import exp_below

LogitsDtype: TypeAlias = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an engine may look at, besides logits and settings, to choose its steps.

    Attributes
    ----------
    prompt, output : sequence of int
        What has been read and written so far.
    V : int
        Size of the vocabulary.
    logits_dtype : {"float32", "float16", "bfloat16"}
        Format in which the model gave the logits; the numbers themselves are kept in a wider one.
    """

    prompt: Sequence[int]
    output: Sequence[int]
    V: int
    logits_dtype: LogitsDtype = "float32"


StepsOf: TypeAlias = Callable[[SamplingParams, Context], list[Step]]


@dataclass(frozen=True)
class Engine:
    """One engine's way from logits to a distribution.

    Attributes
    ----------
    name : str
        What users call it.
    source : str
        Repository, version and file that the steps were read from.
    steps : callable
        ``steps(params, context)`` lists the steps that act, in order, or raises ValueError where the engine refuses
        the settings.
    dtype : type of numpy.floating
        Format of scores and probabilities. An engine that computes in a narrower format of its logits has steps that
        round to it.
    total : type of numpy.floating
        Format in which the probabilities of the kept tokens are summed at the end.
    """

    name: str
    source: str
    steps: StepsOf
    dtype: type[np.floating[Any]] = np.float32
    total: type[np.floating[Any]] = np.float32


@dataclass(frozen=True, eq=False)
class State:
    """Scores after one step.

    Attributes
    ----------
    name : str
        The step; ``logits`` for the input.
    rule : str
        What the step does, in a sentence, and its setting.
    logits : ndarray, shape (V,)
        The last scores that were logits.
    scores : ndarray, shape (V,)
        Logits or, after the step ``softmax``, probabilities; removed tokens are minus infinity.
    weights : ndarray, shape (V,)
        Shares of the probability, unnormalised; 0 for removed tokens.
    """

    name: str
    rule: str
    logits: Array
    scores: Array
    weights: Array

    @property
    def kept(self) -> Array:
        """Ids that are left, ascending."""
        return np.flatnonzero(self.scores > -np.inf)


@dataclass(frozen=True, eq=False)
class Distribution:
    """What an engine would draw from.

    Attributes
    ----------
    engine : str
        Its name.
    kept : ndarray of int
        Ids that are left, ascending.
    probs : ndarray, shape (V,)
        Their probabilities, in the engine's format; 0 for removed tokens.
    states : tuple of State
        The input, then the scores after each step.
    """

    engine: str
    kept: Array
    probs: Array
    states: tuple[State, ...]


def run(engine: Engine, logits: Array, params: SamplingParams, context: Context) -> Distribution:
    """Scores after each step, and the distribution at their end. logits (V,)."""
    steps = engine.steps(params, context)
    with np.errstate(all="ignore"):  # overflow and 0 / 0 are said in words below
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
    function = inspect.unwrap(step)
    summary = (inspect.getdoc(getattr(function, "func", function)) or "").partition("\n")[0].rstrip(".")
    setting = getattr(params, "typical_p" if name == "typical" else name, None)
    return f"{summary} ({name} = {setting:g})" if isinstance(setting, (int, float)) else summary
