"""A candidate's trace, forced through the reference: each operation is judged on the engine's own inputs.

The reference runs in float64. At every named tensor the tap compares what the reference makes of the candidate's inputs
with what the candidate made of them, then continues with the candidate's. So an error is seen where it is made and
nowhere else, and its bound is that of one operation. Where the candidate lacks a tensor, the reference's is used in its
place, and what it may be off by is allowed for from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refgemma.cache import KVCache
from refgemma.config import Config
from refgemma.errors import InputError
from refgemma.model import Tap, forward, identity
from refgemma.numerics import Array, Numerics
from refgemma.ops.attention import allowed_keys
from refgemma.oracle.bounds.arithmetic import Arithmetic, arithmetic_of, params_in, storage_slack
from refgemma.oracle.bounds.flow import Flow, chunks
from refgemma.oracle.bounds.slack import Bound, Known
from refgemma.oracle.judging.grades import Finding, grade_of, not_given, worse
from refgemma.oracle.judging.patterns import pattern
from refgemma.oracle.operations import axes_of, names_of, shape_of, split_name
from refgemma.oracle.traces.trace import Trace, of_chunk
from refgemma.params import Params


def judge_forced(
    params: Params,
    config: Config,
    trace: Trace,
    arithmetic: str | Numerics | Arithmetic,
    *,
    tap: Tap = identity,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Judge every named tensor of a trace, each on the engine's own inputs.

    Padding is not compared, nor are scores of keys that a query does not see. A number that is not finite is wrong, and
    the reference's replaces it.
    """
    a = arithmetic_of(arithmetic)
    params = params_in(params, a)
    _check_shapes(trace, config)
    findings: dict[str, Finding] = {}
    flow = Flow(params, config, a)
    B, T = trace.tokens.shape
    cache = KVCache(config, batch=B, capacity=T, dtype=np.float64)
    every = bool({"final_norm", "logits"} & set(trace.tensors))
    pieces = list(chunks(config, B, T, logits=every))
    done = 0

    for start, stop in pieces:
        flow.next_chunk(trace.tokens[:, start:stop], trace.positions[:, start:stop])

        def judged(name: str, reference: Array, start: int = start) -> Array:
            nonlocal done
            reference = tap(name, reference)
            given = _given(trace, name, reference, start, a)
            if given is None and (name == "logits" or (name == "final_norm" and not every)):
                return reference  # nothing that is judged comes after it
            bound = flow.bound_of(name, reference)
            if given is None:
                findings.setdefault(name, not_given(name))
                known = Known(reference, bound.worst, bound.variance)
            else:
                if given.compared.any():
                    finding = _compare(name, reference, given, bound, flow, start)
                    findings[name] = worse(findings.get(name), finding)
                known = _continued(reference, given, bound)
            flow.goes_on_with(name, known)
            if split_name(name)[1] == "out":
                done += 1
                if progress is not None:
                    progress(done, len(pieces) * config.num_layers)
            return known.value

        forward(
            params,
            config,
            trace.tokens[:, start:stop],
            positions=trace.positions[:, start:stop],
            cache=cache,
            logits="all" if every else "last",
            numerics=a.reference,
            tap=judged,
        )
    return [findings.get(name) or not_given(name) for name in names_of(config, params)]


@dataclass(frozen=True, eq=False)
class _Given:
    """The candidate's tensor for one chunk."""

    value: Array
    finite: Array  # of bool, where a finite number is given
    compared: Array  # of bool, where it is judged
    missing: Array  # of bool, where it counts and no finite number is given
    stored: Array | float  # what storing it in a narrower format took away, at most


def _given(trace: Trace, name: str, reference: Array, start: int, a: Arithmetic) -> _Given | None:
    """The candidate's tensor for this chunk, or None if it has none."""
    if name not in trace.tensors:
        return None
    scores = axes_of(name) == "BNTS"
    chunk = slice(start, start + reference.shape[2 if scores else 1])
    positions = trace.positions[:, chunk]
    counts = positions >= 0
    value, given = of_chunk(trace, name, chunk)
    here = counts & given
    if scores:
        keys = trace.positions[:, : reference.shape[-1]]
        value = value[..., : reference.shape[-1]]
        seen = allowed_keys(positions, keys)
        counts, here = ((rows[:, :, None] & seen)[:, None] for rows in (counts, here))
    else:
        counts, here = (rows.reshape(*rows.shape, *[1] * (reference.ndim - 2)) for rows in (counts, here))
    here = np.broadcast_to(here, reference.shape)
    finite = here & np.isfinite(value)
    stored = storage_slack(np.where(finite, value, 0), trace.dtypes.get(name, ""), a.storage)
    return _Given(value, finite, here, counts & ~finite, stored)


def _continued(reference: Array, given: _Given, bound: Bound) -> Known:
    """The candidate's number where it is given; else the reference's, with its slack; the reference's 0 at padding."""
    value = np.where(given.finite, given.value, reference)
    if isinstance(given.stored, float) and not given.missing.any():
        return Known(value)
    return Known(
        value,
        np.where(given.missing, bound.worst, given.stored),
        np.where(given.missing, bound.variance, np.square(given.stored)),
    )


def _compare(name: str, reference: Array, given: _Given, bound: Bound, flow: Flow, start: int) -> Finding:
    """Finding for one tensor of one chunk."""
    error = np.where(given.finite, np.abs(given.value - reference), np.where(given.compared, np.inf, 0))
    worst, likely = bound.worst + given.stored, bound.likely + given.stored
    # After a number that overflows when squared, NaN over NaN is undefined, so not counted as an error.
    ratios = np.where(given.compared, np.nan_to_num(error / worst, nan=0.0, posinf=np.inf), -1.0)
    at = np.unravel_index(int(ratios.argmax()), ratios.shape)
    ratio = float(ratios[at])
    chance = float(np.max(np.where(given.compared, np.nan_to_num(error / likely, nan=0.0, posinf=np.inf), 0)))
    grade = grade_of(ratio, chance)
    common = ""
    if grade != "inside rounding":
        common = pattern(
            given.value,
            reference,
            axes=axes_of(name),
            positions=flow.positions,
            where=given.compared,
            slack=worst if grade == "wrong" else likely,
            others=flow.inputs(split_name(name)[1]),
        )
    where = [int(i) for i in at]
    where[axes_of(name).index("T")] += start
    return Finding(
        name=name,
        grade=grade,
        ratio=ratio,
        error=float(error[at]),
        bound=float(np.broadcast_to(worst, error.shape)[at]),
        where=tuple(where),
        value_candidate=float(given.value[at]),
        value_reference=float(reference[at]),
        pattern=common,
        reason=bound.reason + ("" if isinstance(given.stored, float) else "; and stored more narrowly than that"),
        likely=chance,
    )


def _check_shapes(trace: Trace, config: Config) -> None:
    """Refuse a tensor that cannot be of this model."""
    B, T = trace.tokens.shape
    for name, value in trace.tensors.items():
        kept = value.shape[axes_of(name).index("T")] if value.ndim == len(axes_of(name)) else 1
        want = shape_of(name, config, B, T, last=trace.is_cut(name), kept=kept)
        if value.shape != want:
            raise InputError(f"the candidate's {name} has shape {value.shape}: expected {want} for {B} x {T} tokens")
