"""Their trace, forced through the reference: each operation judged on the engine's own inputs.

The reference runs in float64. At every named tensor the tap compares what the reference makes of *their* inputs with
what they made of them, then goes on with theirs. So an error is seen where it is made and nowhere else, and its bound
is that of one operation. A tensor that they did not give is bridged: ours stands in, and what it may be off by is
allowed for from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refgemma.cache import KVCache
from refgemma.config import Config
from refgemma.errors import InputError
from refgemma.model import Params, Tap, forward, identity
from refgemma.numerics import Array, Numerics
from refgemma.ops.attention import allowed_keys
from refgemma.oracle.bounds.arithmetic import Arithmetic, arithmetic_of, params_in
from refgemma.oracle.bounds.flow import Flow, chunks
from refgemma.oracle.bounds.slack import Bound, Known
from refgemma.oracle.diagnosis.candidate import of_chunk
from refgemma.oracle.judging.grades import Finding, grade_of, not_given, worse
from refgemma.oracle.judging.patterns import pattern
from refgemma.oracle.judging.storage import lost
from refgemma.oracle.operations import axes_of, names_of, shape_of, split_name
from refgemma.oracle.traces.trace import Trace


def judge_forced(
    params: Params,
    config: Config,
    theirs: Trace,
    arithmetic: str | Numerics | Arithmetic,
    *,
    tap: Tap = identity,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Judge every named tensor of a trace, each on the engine's own inputs.

    Padding is not compared, nor are scores of keys that a query does not see. A number of theirs that is not finite
    is wrong, and ours stands in for it.
    """
    a = arithmetic_of(arithmetic)
    params = params_in(params, a)
    _check_shapes(theirs, config)
    findings: dict[str, Finding] = {}
    flow = Flow(params, config, a)
    B, T = theirs.tokens.shape
    cache = KVCache(config, batch=B, capacity=T, dtype=np.float64)
    every = bool({"final_norm", "logits"} & set(theirs.tensors))  # positions are worth the widest product of all
    pieces = list(chunks(T, B * max(config.vocab_size if every else 1, config.intermediate_size)))
    done = 0

    for start, stop in pieces:
        flow.next_chunk(theirs.tokens[:, start:stop], theirs.positions[:, start:stop])

        def judged(name: str, ours: Array, start: int = start) -> Array:
            nonlocal done
            ours = tap(name, ours)
            given = _given(theirs, name, ours, start, a)
            if given is None and (name == "logits" or (name == "final_norm" and not every)):
                return ours  # nothing that is judged comes after it
            bound = flow.bound_of(name, ours)
            if given is None:
                findings.setdefault(name, not_given(name))
                known = Known(ours, bound.worst, bound.variance)
            else:
                if given.compared.any():
                    finding = _compare(name, ours, given, bound, flow, start)
                    findings[name] = worse(findings.get(name), finding)
                known = _going_on(ours, given, bound)
            flow.goes_on_with(name, known)
            if split_name(name)[1] == "out":
                done += 1
                if progress is not None:
                    progress(done, len(pieces) * config.num_layers)
            return known.value

        forward(
            params,
            config,
            theirs.tokens[:, start:stop],
            positions=theirs.positions[:, start:stop],
            cache=cache,
            logits="all" if every else "last",
            numerics=a.reference,
            tap=judged,
        )
    return [findings.get(name) or not_given(name) for name in names_of(config)]


@dataclass(frozen=True, eq=False)
class _Given:
    """Their tensor as the pass sees it: where they gave a finite number, where it counts, and how it was stored."""

    value: Array
    finite: Array  # of bool, where a number of theirs stands
    compared: Array  # of bool, where it is judged
    missing: Array  # of bool, where it counts and they gave none
    stored: Array | float  # what storing it in a narrower format took away, at most


def _given(theirs: Trace, name: str, ours: Array, start: int, a: Arithmetic) -> _Given | None:
    """Their tensor for this chunk, or None if they have none."""
    if name not in theirs.tensors:
        return None
    scores = axes_of(name) == "BNTS"
    axis = 2 if scores else 1
    chunk = slice(start, start + ours.shape[axis])
    places = theirs.positions[:, chunk]
    counts = places >= 0
    value, given = of_chunk(theirs, name, chunk)
    here = counts & given
    if scores:
        keys = theirs.positions[:, : ours.shape[-1]]
        value = value[..., : ours.shape[-1]]
        seen = allowed_keys(places, keys)
        counts, here = ((rows[:, :, None] & seen)[:, None] for rows in (counts, here))
    else:
        counts, here = (rows.reshape(*rows.shape, *[1] * (ours.ndim - 2)) for rows in (counts, here))
    here = np.broadcast_to(here, ours.shape)
    finite = here & np.isfinite(value)
    stored = lost(np.where(finite, value, 0), theirs.dtypes.get(name, ""), a.storage)
    return _Given(value, finite, here, counts & ~finite, stored)


def _going_on(ours: Array, given: _Given, bound: Bound) -> Known:
    """Theirs where they gave it; ours, with its slack, where they did not; ours at padding, which is zero."""
    value = np.where(given.finite, given.value, ours)
    if isinstance(given.stored, float) and not given.missing.any():
        return Known(value)
    return Known(
        value,
        np.where(given.missing, bound.worst, given.stored),
        np.where(given.missing, bound.variance, np.square(given.stored)),
    )


def _compare(name: str, ours: Array, given: _Given, bound: Bound, flow: Flow, start: int) -> Finding:
    """Finding for one tensor of one chunk."""
    error = np.where(given.finite, np.abs(given.value - ours), np.where(given.compared, np.inf, 0))
    worst, likely = bound.worst + given.stored, bound.likely + given.stored
    # After a number that overflows when squared there is no telling: NaN over NaN is nobody's error here.
    ratios = np.where(given.compared, np.nan_to_num(error / worst, nan=0.0, posinf=np.inf), -1.0)
    at = np.unravel_index(int(ratios.argmax()), ratios.shape)
    ratio = float(ratios[at])
    chance = float(np.max(np.where(given.compared, np.nan_to_num(error / likely, nan=0.0, posinf=np.inf), 0)))
    grade = grade_of(ratio, chance)
    common = ""
    if grade != "inside rounding":
        common = pattern(
            given.value,
            ours,
            axes=axes_of(name),
            positions=flow.positions,
            where=given.compared,
            slack=worst if grade == "wrong" else likely,
            others=flow.inputs(split_name(name)[1]),
        )
    where = [int(i) for i in at]
    where[2 if axes_of(name) == "BNTS" else 1] += start
    return Finding(
        name=name,
        grade=grade,
        ratio=ratio,
        error=float(error[at]),
        bound=float(np.broadcast_to(worst, error.shape)[at]),
        where=tuple(where),
        value_theirs=float(given.value[at]),
        value_ours=float(ours[at]),
        pattern=common,
        reason=bound.reason + ("" if isinstance(given.stored, float) else "; and stored more narrowly than that"),
        likely=chance,
    )


def _check_shapes(theirs: Trace, config: Config) -> None:
    """A sentence for a tensor that cannot be of this model."""
    B, T = theirs.tokens.shape
    for name, value in theirs.tensors.items():
        kept = value.shape[axes_of(name).index("T")] if value.ndim == len(axes_of(name)) else 1
        want = shape_of(name, config, B, T, last=theirs.is_cut(name), kept=kept)
        if value.shape != want:
            raise InputError(f"their {name} has shape {value.shape}: for {B} x {T} tokens this model makes {want}")
