"""The whole of a trace judged: each operation, and the run from end to end; as computed, or as only stored so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refgemma.checkpoint.load import Progress
from refgemma.config import Config
from refgemma.model import Params
from refgemma.oracle.drift import drift
from refgemma.oracle.forced import judge_forced
from refgemma.oracle.precision import arithmetic_of
from refgemma.oracle.stored import as_stored, looks_stored
from refgemma.oracle.tensor_names import names_of, split_name
from refgemma.oracle.trace import Trace
from refgemma.oracle.verdict import Finding

# What is followed from end to end.
_STREAM = ("embed", "attn.residual", "out", "final_norm", "logits")


def judged(
    params: Params, config: Config, theirs: Trace, arithmetic: str, progress: Progress | None = None
) -> tuple[list[Finding], list[Finding]]:
    """Judge every tensor on their own inputs, unless logits are all there is; and the stream from end to end.

    Parameters
    ----------
    params : Params
        The weights that the engine read.
    config : Config
        The model.
    theirs : Trace
        What it computed.
    arithmetic : str
        What it computed in.
    progress : callable, optional
        ``progress(done, total)``, in layers.

    Returns
    -------
    findings, drifts : list of Finding
        In the order of the computation; the first empty for logits alone.

    Raises
    ------
    ValueError
        If the arithmetic is unknown, or a tensor is not of this model.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # what is squared on the way may well overflow
        return _judged(params, config, theirs, arithmetic, progress)


def _judged(
    params: Params, config: Config, theirs: Trace, arithmetic: str, progress: Progress | None
) -> tuple[list[Finding], list[Finding]]:
    findings: list[Finding] = []
    drifts: list[Finding] = []
    if set(theirs.tensors) - set(theirs.ends):
        if set(theirs.tensors) != {"logits"}:
            findings = judge_forced(params, config, theirs, arithmetic, progress=progress)
        drifts = _drifts(params, config, theirs, arithmetic)
    if theirs.ends:
        end = _end(theirs)
        if set(end.tensors) != {"logits"}:
            tail = judge_forced(params, config, end, arithmetic)
            at_the_end = {one.name: one for one in tail if one.name in theirs.ends}
            findings = [at_the_end.get(one.name, one) for one in findings] or list(at_the_end.values())
        drifts += [one for one in _drifts(params, config, end, arithmetic) if one.name in theirs.ends]
    return findings, drifts


def as_told(
    params: Params, config: Config, theirs: Trace, progress: Progress | None = None
) -> tuple[str, list[Finding], list[Finding]]:
    """Judge a trace as what its numbers tell; where that cannot be, as computed in float32 and stored more narrowly.

    Parameters
    ----------
    params : Params
        The weights that the engine read.
    config : Config
        The model.
    theirs : Trace
        What it computed.
    progress : callable, optional
        ``progress(done, total)``, in layers.

    Returns
    -------
    arithmetic : str
        What it was judged as, its name first, and why.
    findings, drifts : list of Finding
        As `judged` gives them.
    """
    guess, why = arithmetic_of(theirs)
    findings, drifts = judged(params, config, theirs, guess, progress)
    if guess not in ("bfloat16", "float16") or all(one.ok for one in findings):
        return f"{guess} ({why})", findings, drifts
    stored = as_stored(theirs)
    other, other_drifts = judged(params, config, stored, "float32", progress)
    if not looks_stored(findings, other):
        return f"{guess} ({why})", findings, drifts
    wrong = sum(not one.ok for one in findings)
    why = f"only stored as {guess}: as computed in {guess}, {wrong} tensors would be wrong, most by a rounding or two"
    return f"float32 ({why})", other, other_drifts


def without_the_last_token(theirs: Trace) -> Trace | None:
    """Trace of one token less: what an engine that generates drew last, it never fed.

    Parameters
    ----------
    theirs : Trace
        Of the last positions.

    Returns
    -------
    Trace or None
        With the same tensors, one position earlier; None where that cannot be.
    """
    longest = max(value.shape[1] for value in (theirs.ends or theirs.tensors).values())
    if not (theirs.ends or theirs.last) or longest >= theirs.tokens.shape[1] or (theirs.positions[:, -1] < 0).any():
        return None
    return replace(theirs, tokens=theirs.tokens[:, :-1], positions=theirs.positions[:, :-1])


def _drifts(params: Params, config: Config, theirs: Trace, arithmetic: str) -> list[Finding]:
    stream = [name for name in names_of(config) if split_name(name)[1] in _STREAM]
    return drift(params, config, theirs, arithmetic, names=stream)


def _end(theirs: Trace) -> Trace:
    """What was given of the last positions alone, with the stream that it was made from."""
    if theirs.last:
        return replace(theirs, tensors=dict(theirs.ends), ends={})
    kept = max(value.shape[1] for value in theirs.ends.values())
    rows = np.arange(len(theirs.tokens))[:, None]
    last = theirs.tokens.shape[1] - 1 - (theirs.positions[:, ::-1] >= 0).argmax(axis=1)
    places = last[:, None] + np.arange(1 - kept, 1)
    stream = [name for name in theirs.tensors if name == "final_norm" or split_name(name)[1] == "out"]
    tensors = {name: theirs.tensors[name][rows, places] for name in stream} | dict(theirs.ends)
    return replace(theirs, tensors=tensors, ends={}, meta={**theirs.meta, "last": "true"})
