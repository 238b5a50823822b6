"""refgemma itself, in float64, as one of the engines."""

from __future__ import annotations

import functools

import numpy as np

from refgemma.sampling import steps as shared
from refgemma.sampling.decision import GREEDY_BELOW, Step, steps_of
from refgemma.sampling.engines.engine import Context, Engine
from refgemma.sampling.engines.parts import first_maximum
from refgemma.sampling.params import SamplingParams


def steps(params: SamplingParams, context: Context) -> list[Step]:
    """Steps of `decide`, and the greedy choice as one more."""
    chosen: list[Step] = [
        (name, functools.update_wrapper(functools.partial(step), getattr(shared, name)))  # for its docstring
        for name, step in steps_of(params, context.prompt, context.output)
    ]
    return [*chosen, ("greedy", first_maximum)] if params.temperature < GREEDY_BELOW else chosen


ENGINE = Engine("refgemma", "this package", steps, dtype=np.float64, total=np.float64)
