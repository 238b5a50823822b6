"""The whole of a trace judged: each operation, and the run from end to end; as computed, or as only stored so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refgemma.checkpoint.load import Progress
from refgemma.config import Config
from refgemma.model import Params
from refgemma.oracle.judging.forced import judge_forced
from refgemma.oracle.judging.free_run import drift
from refgemma.oracle.judging.grades import Finding
from refgemma.oracle.judging.precision import arithmetic_of
from refgemma.oracle.judging.storage import as_stored, looks_stored
from refgemma.oracle.traces.trace import Trace


def judged_operations(
    params: Params, config: Config, theirs: Trace, arithmetic: str, progress: Progress | None = None
) -> list[Finding]:
    """Judge every tensor on their own inputs."""
    if set(theirs.tensors) == {"logits"}:
        return []
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # what is squared on the way may well overflow
        return judge_forced(params, config, theirs, arithmetic, progress=progress)


def judged_run(params: Params, config: Config, theirs: Trace, arithmetic: str) -> list[Finding]:
    """Judge the stream from end to end, and the logits."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # what is squared on the way may well overflow
        return drift(params, config, theirs, arithmetic)


def as_told(
    params: Params, config: Config, theirs: Trace, progress: Progress | None = None
) -> tuple[str, str, Trace, list[Finding]]:
    """Judge operations as what the numbers tell; where that cannot be, as of float32 and stored more narrowly."""
    guess, why = arithmetic_of(theirs)
    findings = judged_operations(params, config, theirs, guess, progress)
    if guess not in ("bfloat16", "float16") or all(one.ok for one in findings):
        return guess, why, theirs, findings
    stored = as_stored(theirs)
    other = judged_operations(params, config, stored, "float32", progress)
    if not looks_stored(findings, other) and not _is_right(params, config, stored, other):
        return guess, why, theirs, findings
    wrong = sum(not one.ok for one in findings)
    tensors = "1 tensor" if wrong == 1 else f"{wrong} tensors"
    why = f"only stored as {guess}: as computed in {guess}, {tensors} would be wrong, most by a rounding or two"
    return "float32", why, stored, other


def _is_right(params: Params, config: Config, theirs: Trace, findings: list[Finding]) -> bool:
    """Whether a float32 run made these numbers: few tensors may fit together by chance, but not the run as well."""
    return all(one.ok for one in findings) and all(one.ok for one in judged_run(params, config, theirs, "float32"))


def without_the_last_token(theirs: Trace) -> Trace | None:
    """Trace of one token less: what an engine that generates drew last, it never fed."""
    longest = max(value.shape[1] for value in theirs.tensors.values())
    if not theirs.last or longest >= theirs.tokens.shape[1] or (theirs.positions[:, -1] < 0).any():
        return None
    return replace(theirs, tokens=theirs.tokens[:, :-1], positions=theirs.positions[:, :-1])
