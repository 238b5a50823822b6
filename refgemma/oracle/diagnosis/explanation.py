"""One explanation: the reference with some known bugs in it, and how its numbers compare with a candidate's trace."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refgemma.config import Config
from refgemma.numerics import FLOAT64, PROFILES, Array, Numerics
from refgemma.ops.attention import allowed_keys
from refgemma.oracle.bounds.arithmetic import ALIASES, CONSTANTS, UNIT, Arithmetic, arithmetic_of
from refgemma.oracle.bugs.port import Chunks, Setup, port_tap, run
from refgemma.oracle.judging.forced import judge_forced
from refgemma.oracle.judging.grades import Finding
from refgemma.oracle.operations import axes_of
from refgemma.oracle.traces.trace import Trace, of_chunk
from refgemma.params import Params

# Rounded values that do not depend on the activations: the same numbers in every engine that rounds them.
_FIXED = (*CONSTANTS, "rope.angle", "rope.exponent", "rope.timescale")


def honest_setup(params: Params, config: Config, candidate: Trace, arithmetic: str) -> Setup:
    """Setup without bugs."""
    storage = arithmetic_of(arithmetic).storage
    profile = FLOAT64 if storage == "float16" else PROFILES[ALIASES.get(arithmetic, arithmetic)]  # none has float16
    numerics = replace(profile, dtype=FLOAT64.dtype)
    return Setup(
        params=params, config=config, tokens=candidate.tokens, positions=candidate.positions, numerics=numerics
    )


def judge(setup: Setup, honest: Setup, candidate: Trace, arithmetic: str) -> list[Finding]:
    """Judge each operation of a candidate, on its own inputs, by the reference with the bugs of a setup."""
    a = with_roundings(arithmetic_of(arithmetic), honest.numerics, setup.numerics)
    setup = setup.but(numerics=a.reference)
    trace = replace(candidate, tokens=setup.tokens, positions=setup.positions)
    tap = port_tap(setup, instead=lambda name, value, chunk: _given_at(trace, name, value, chunk))
    return judge_forced(setup.params, setup.config, trace, a, tap=tap)


@dataclass(frozen=True)
class Misfit:
    """How far a tensor of an explanation, every rounding imitated, is from the candidate's, on the candidate's inputs.

    A rounding that falls the other way moves one number far, and the mean hardly at all.
    """

    mean: float  # mean difference over mean magnitude
    peak: float  # largest difference over the token's largest number, or over the mean magnitude of all if that is more


def misfits(setup: Setup, candidate: Trace) -> dict[str, Misfit]:
    """How far each tensor of an explanation is from the candidate's; empty if the numbers of tokens differ."""
    found: dict[str, Misfit] = {}
    if not fits(setup.tokens, candidate):
        return found
    chunks, trace = Chunks(), replace(candidate, tokens=setup.tokens, positions=setup.positions)

    def tap(name: str, value: Array) -> Array:
        given = _given_at(trace, name, value, chunks.at(name, value))
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
    """Arithmetic with the rounding points in which two numerics differ added or removed."""
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


# ---- the candidate's trace


def fits(tokens: Array, candidate: Trace) -> bool:
    """Whether a candidate's tensors have as many positions as tokens were fed. tokens BT."""
    length_axis = {name: "S" if candidate.is_cut(name) else "T" for name in candidate.tensors}
    lengths = {
        candidate.tensors[name].shape[axes_of(name).index(axis)]
        for name, axis in length_axis.items()
        if axis in axes_of(name)
    }
    return lengths <= {tokens.shape[1]}


def overflows(candidate: Trace, name: str, limit: float) -> bool:
    """Whether a tensor holds NaN, or a number beyond a limit, where it counts."""
    value, positions = candidate.tensors[name], candidate.positions
    kept = value.shape[axes_of(name).index("T")]
    if candidate.is_cut(name):
        T = positions.shape[1]
        at = T - 1 - (positions[:, ::-1] >= 0).argmax(axis=1)[:, None] + np.arange(1 - kept, 1)
        positions = np.where(at >= 0, np.take_along_axis(positions, np.maximum(at, 0), axis=1), -1)
    elif kept != positions.shape[1]:
        return False  # other tokens were fed, so padding is unknown
    here = _counted(name, positions, candidate.positions)
    return not float(np.abs(np.where(here, value, 0)).max()) <= limit  # true of NaN as well


def _given_at(candidate: Trace, name: str, computed: Array, chunk: slice) -> Array:
    """The candidate's tensor of some positions; what the explanation computed where it lacks a number."""
    if name not in candidate.tensors:
        return computed
    wide, given = of_chunk(candidate, name, chunk)
    if axes_of(name) == "BNTS":
        wide = wide[..., : chunk.stop]
    positions = candidate.positions
    here = _counted(name, np.where(given, positions[:, chunk], -1), positions[:, : chunk.stop])
    return np.where(here & np.isfinite(wide), wide, computed)


def _counted(name: str, positions: Array, keys: Array) -> Array:
    """Where a tensor counts: not at padding, nor at keys that the query does not see; broadcasts to the tensor."""
    if axes_of(name) == "BNTS":
        return allowed_keys(positions, keys)[:, None]
    return (positions >= 0).reshape(*positions.shape, *[1] * (len(axes_of(name)) - 2))
