"""One explanation put to the test: the reference with some known bugs in it, forced along another engine's trace."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refgemma.config import Config
from refgemma.model import Params
from refgemma.numerics import FLOAT64, PROFILES, Array, Numerics
from refgemma.oracle.bounds.arithmetic import ALIASES, CONSTANTS, UNIT, Arithmetic, arithmetic_of
from refgemma.oracle.bugs.port import Chunks, Setup, port_tap, run
from refgemma.oracle.diagnosis.candidate import fits, theirs_at
from refgemma.oracle.judging.forced import judge_forced
from refgemma.oracle.judging.grades import Finding
from refgemma.oracle.operations import axes_of
from refgemma.oracle.traces.trace import Trace

# Rounded values that do not depend on the activations: the same numbers in every engine that rounds them.
_FIXED = (*CONSTANTS, "rope.angle", "rope.exponent", "rope.timescale")


def honest_setup(params: Params, config: Config, theirs: Trace, arithmetic: str) -> Setup:
    """Setup without departures."""
    storage = arithmetic_of(arithmetic).storage
    profile = FLOAT64 if storage == "float16" else PROFILES[ALIASES.get(arithmetic, arithmetic)]  # none rounds to that
    numerics = replace(profile, dtype=FLOAT64.dtype)
    return Setup(params=params, config=config, tokens=theirs.tokens, positions=theirs.positions, numerics=numerics)


def judge(setup: Setup, honest: Setup, theirs: Trace, arithmetic: str) -> list[Finding] | None:
    """Their trace, each operation on their own inputs, judged by the reference with the departures of a setup."""
    if not fits(setup.tokens, theirs):
        return None
    a = with_roundings(arithmetic_of(arithmetic), honest.numerics, setup.numerics)
    setup = setup.but(numerics=a.reference)
    trace = replace(theirs, tokens=setup.tokens, positions=setup.positions)
    tap = port_tap(setup, instead=lambda name, value, chunk: theirs_at(trace, name, value, chunk))
    return judge_forced(setup.params, setup.config, trace, a, tap=tap)


@dataclass(frozen=True)
class Misfit:
    """How far one tensor of an explanation, every rounding imitated, is from theirs, on their own inputs."""

    # mean difference over mean magnitude. A rounding that falls the other way moves one number far, and the mean hardly
    # at all
    mean: float
    # largest difference over the largest number of the same token, or over the mean magnitude of all if that is more
    peak: float


def misfits(setup: Setup, theirs: Trace) -> dict[str, Misfit]:
    """How far the numbers of an explanation are from theirs."""
    found: dict[str, Misfit] = {}
    if not fits(setup.tokens, theirs):
        return found
    chunks, trace = Chunks(), replace(theirs, tokens=setup.tokens, positions=setup.positions)

    def tap(name: str, value: Array) -> Array:
        given = theirs_at(trace, name, value, chunks.at(name, value))
        if name in trace.tensors:
            t = axes_of(name).index("T")
            rest = tuple(axis for axis in range(1, value.ndim) if axis != t)
            error, size = np.abs(given - value), np.abs(given)
            mean = max(float(size.mean()), 1e-300)
            peaks = error.max(axis=rest) / np.maximum(size.max(axis=rest), mean)
            one = Misfit(float(error.mean()) / mean, float(peaks.max()))
            before = found.get(name, one)
            found[name] = Misfit(max(one.mean, before.mean), max(one.peak, before.peak))
        return given

    run(setup, tap)
    return found


def loosens(arithmetic: str, honest: Setup, setup: Setup) -> bool:
    """Whether an explanation has looser bounds than the honest reference, so that being inside them says little."""
    a = arithmetic_of(arithmetic)
    return with_roundings(a, honest.numerics, setup.numerics).points > a.points


def with_roundings(a: Arithmetic, before: Numerics, after: Numerics) -> Arithmetic:
    """Arithmetic that rounds at other points, too."""
    reference, points = dict(a.reference.rounding), set(a.points)
    for point in before.rounding.keys() | after.rounding.keys():
        narrow = after.rounding.get(point)
        if narrow == before.rounding.get(point):
            continue
        if narrow is None:
            reference.pop(point, None)
            points.discard(point)
        elif point in _FIXED or narrow == "float32":
            reference[point] = narrow
        else:
            points.add(point)
    return replace(
        a,
        reference=replace(a.reference, rounding=reference),
        points=frozenset(points),
        narrow=max(a.narrow, UNIT["bfloat16"]) if points - a.points else a.narrow,
    )
