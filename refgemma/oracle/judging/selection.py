"""As which arithmetic a trace is judged: recognised from its numbers, or float32 that was only stored in less.

An engine that computes in bfloat16 writes most of its tensors in it; of one that computes in float32 hardly any tensor
holds nothing but bfloat16 numbers. A float32 run that was saved as float16 or bfloat16 looks like one computed in that
format, but its operations do not fit together: each was computed from numbers that had not been rounded yet. So most
kinds of operation are off by a rounding or two, where an engine with a bug is off in one kind or a few.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from refgemma.checkpoint.load import Progress
from refgemma.config import Config
from refgemma.numerics import PROFILES, Array
from refgemma.oracle.judging.forced import judge_forced
from refgemma.oracle.judging.free_run import drift
from refgemma.oracle.judging.grades import Finding
from refgemma.oracle.operations import OPERATIONS, split_name
from refgemma.oracle.thresholds import EXAMINED, NUMBERS, STORED_LEFT, STORED_WRONG
from refgemma.oracle.traces.trace import Trace
from refgemma.params import Params

_NARROW_FIRST = ("bfloat16", "float16", "float32", "float64")


def recognised_arithmetic(trace: Trace) -> tuple[str, str]:
    """Narrowest format that holds most tensors exactly, and how that is known."""
    if trace.meta.get("numerics") in PROFILES:
        return trace.meta["numerics"], "as its metadata says"
    stored = [trace.dtypes[name] for name in trace.tensors]
    commonest = max(_NARROW_FIRST, key=stored.count)
    names = [name for name in trace.tensors if trace.dtypes[name] == commonest]
    some = names[:: max(1, len(names) // EXAMINED)]
    held = [narrowest(np.asarray(trace.tensors[name]).reshape(-1)[:NUMBERS]) for name in some]
    for dtype in _NARROW_FIRST[: _NARROW_FIRST.index(commonest)]:
        if 2 * sum(_NARROW_FIRST.index(one) <= _NARROW_FIRST.index(dtype) for one in held if one) > len(some):
            return dtype, f"stored as {commonest}, but most numbers are {dtype} numbers"
    return commonest, f"stored as {commonest}"


def narrowest(numbers: Array) -> str:
    """Narrowest format that holds all of some numbers; empty if they are all 0, 1 or not finite."""
    telling = numbers[np.isfinite(numbers) & (numbers != 0) & (numbers != 1)]
    if not telling.size:
        return ""
    with np.errstate(over="ignore"):
        single = telling.astype(np.float32)
        if not (single == telling).all():
            return "float64"
        if not (single.view(np.uint32) & np.uint32(0xFFFF)).any():
            return "bfloat16"
        return "float16" if (single.astype(np.float16) == single).all() else "float32"


def as_stored(trace: Trace) -> Trace:
    """Trace whose formats are the narrowest that hold the numbers: a float32 file may hold nothing but bfloat16."""
    found = dict(trace.dtypes)
    for name in trace.tensors:
        found[name] = narrowest(np.asarray(trace.tensors[name]).reshape(-1)[:NUMBERS]) or found[name]
    return replace(trace, dtypes=found)


def looks_stored(narrow: Iterable[Finding], wide: Iterable[Finding]) -> bool:
    """Whether a trace, judged as computed in its narrow format and as only stored so, was only stored so."""
    before, after = list(narrow), list(wide)
    given = {_shared(one.name) for one in before if one.grade != "not given"}
    wrong = {_shared(one.name) for one in before if one.grade == "wrong"}
    left = {_shared(one.name) for one in after if one.grade == "wrong"}
    products = {name for name, row in OPERATIONS.items() if row.kind == "product"}
    mixed = bool(wrong & products) and bool(wrong - products)
    return mixed and len(wrong) >= STORED_WRONG * len(given) and len(left) <= STORED_LEFT * len(wrong)


def _shared(name: str) -> str:
    """Operation, where one bug is in all three norms."""
    row = OPERATIONS[split_name(name)[1]]
    return row.kind if row.kind == "norm" else row.name


def judged_operations(
    params: Params, config: Config, trace: Trace, arithmetic: str, progress: Progress | None = None
) -> list[Finding]:
    """Judge every tensor on the engine's own inputs; nothing where only logits were given."""
    if set(trace.tensors) == {"logits"}:
        return []
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # squares on the way may well overflow
        return judge_forced(params, config, trace, arithmetic, progress=progress)


def judged_run(params: Params, config: Config, trace: Trace, arithmetic: str) -> list[Finding]:
    """Judge the residual stream from end to end, and the logits."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # squares on the way may well overflow
        return drift(params, config, trace, arithmetic)


def judged_as_recognised(
    params: Params, config: Config, trace: Trace, progress: Progress | None = None
) -> tuple[str, str, Trace, list[Finding]]:
    """Arithmetic, how it is known, the trace with the formats to judge it by, and its findings."""
    guess, why = recognised_arithmetic(trace)
    findings = judged_operations(params, config, trace, guess, progress)
    if guess not in ("bfloat16", "float16") or all(one.ok for one in findings):
        return guess, why, trace, findings
    stored = as_stored(trace)
    other = judged_operations(params, config, stored, "float32", progress)
    if not looks_stored(findings, other) and not _is_right(params, config, stored, other):
        return guess, why, trace, findings
    wrong = sum(not one.ok for one in findings)
    tensors = "1 tensor" if wrong == 1 else f"{wrong} tensors"
    why = f"only stored as {guess}: as computed in {guess}, {tensors} would be wrong, most by a rounding or two"
    return "float32", why, stored, other


def _is_right(params: Params, config: Config, trace: Trace, findings: list[Finding]) -> bool:
    """Whether a float32 run made these numbers: few tensors may fit together by chance, but not the run as well."""
    return all(one.ok for one in findings) and all(one.ok for one in judged_run(params, config, trace, "float32"))


def without_the_last_token(trace: Trace) -> Trace | None:
    """Trace of one token less: what an engine that generates drew last, it never fed."""
    longest = max(value.shape[1] for value in trace.tensors.values())
    if not trace.last or longest >= trace.tokens.shape[1] or (trace.positions[:, -1] < 0).any():
        return None
    return replace(trace, tokens=trace.tokens[:, :-1], positions=trace.positions[:, :-1])
