"""refgemma itself, in float64, as one of the engines."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from refgemma.sampling import steps as shared
from refgemma.sampling.decision import GREEDY_BELOW, steps_of
from refgemma.sampling.engines.engine import Engine, Step
from refgemma.sampling.engines.parts import first_maximum
from refgemma.sampling.params import SamplingParams


def steps(params: SamplingParams, prompt: Sequence[int], output: Sequence[int], V: int) -> list[Step]:
    """Steps of `decide`, and the greedy choice as one more.

    Parameters
    ----------
    params : SamplingParams
        The settings.
    prompt, output : sequence of int
        What has been read and written so far.
    V : int
        Size of the vocabulary.

    Returns
    -------
    list of (str, callable)
        In order.
    """
    chosen: list[Step] = [
        (name, functools.update_wrapper(functools.partial(step), getattr(shared, name)))  # for its docstring
        for name, step in steps_of(params, prompt, output)
    ]
    return [*chosen, ("greedy", first_maximum)] if params.temperature < GREEDY_BELOW else chosen


ENGINE = Engine("refgemma", "this package", steps, dtype=np.float64, total=np.float64)
