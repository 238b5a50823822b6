"""Name the known bug, or the two, that make the reference compute what another engine computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from refgemma.checkpoint.load import Progress
from refgemma.config import Config
from refgemma.errors import InputError
from refgemma.gemma import Gemma, LoraNames
from refgemma.numerics import Array
from refgemma.oracle.bugs.catalogue import BUGS, Bug, find, with_bugs
from refgemma.oracle.bugs.port import Setup
from refgemma.oracle.diagnosis.by_logits import LogitsTrial
from refgemma.oracle.diagnosis.by_trace import TraceTrial
from refgemma.oracle.diagnosis.explanation import fits, honest_setup, overflows
from refgemma.oracle.diagnosis.result import Cause, Diagnosis
from refgemma.oracle.judging.selection import judged_as_recognised, recognised_arithmetic
from refgemma.oracle.models import read_candidate, weights_of
from refgemma.oracle.operations import names_of
from refgemma.oracle.thresholds import CLOSER, OVERFLOW, TIE
from refgemma.oracle.traces.trace import Trace
from refgemma.params import Params

_BOS = 2  # of every Gemma


def diagnose(
    candidate: Trace | str | Path,
    model: Gemma | str | Path,
    *,
    lora: LoraNames = (),
    arithmetic: str | None = None,
    pairs: bool = True,
    mapping: Mapping[str, str] | None = None,
    tokens: ArrayLike | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Say which known bugs reproduce another engine's numbers.

    Parameters
    ----------
    candidate : Trace, str or Path
        The other engine's trace, or its file: as many tensors as there are, or final logits alone.
    model : Gemma, str or Path
        The model: loaded, what `refgemma.load` takes, or the name of a formula model, such as ``reveal-gqa``.
    lora : str or Path, or a sequence of them
        Adapters that the model ran with, as `refgemma.load` takes them.
    arithmetic : str, optional
        What the candidate was computed in: "float32", "bfloat16", ...; by default recognised from its numbers.
    pairs : bool
        Whether two bugs at once are tried where no single one explains everything.
    mapping : mapping of str to str, optional
        Names in the file to names of the reference.
    tokens : array_like of int, shape (T,) or (B, T), optional
        What was meant to be fed, where the file does not say; for a formula model, its own batch by default.
    progress : callable, optional
        ``progress(done, total)``, in explanations.

    Returns
    -------
    Diagnosis
        Causes, best first.

    Raises
    ------
    FileNotFoundError
        If the file or the model is not there.
    ValueError
        If the file cannot be read, the arithmetic is unknown, or the first tensor has overflowed.

    Notes
    -----
    Each operation of a trace is judged on the candidate's own inputs (`refgemma.oracle.judging.forced`), with each
    known bug in the reference in turn: an explanation is right if nothing is wrong any more. Where no operation is
    wrong, but the logits are not those of the model, the logits are explained. A bug in some layers only is found as
    well, since it explains the operations of these and none of the others. For final logits alone the reference is run
    by itself, and a bug is everywhere. Explanations that fit are ordered by how well they do.
    """
    params, config = weights_of(model, lora)
    trace = candidate
    if not isinstance(trace, Trace):
        trace = read_candidate(trace, model, config, mapping=mapping, tokens=tokens)
    if not (trace.positions >= 0).any():
        raise InputError(
            "all tokens of the candidate are padding: there is nothing to explain; a mask is 1 at real tokens"
        )
    trace, overflow = _finite(trace, config)
    notes = trace.notes
    if arithmetic is None:
        arithmetic, why, trace = _recognised(params, config, trace)
        notes += (f"judged as {arithmetic}: {why}",) * why.startswith("only stored")
    honest = honest_setup(params, config, trace, arithmetic)
    by_logits = set(trace.tensors) == {"logits"}
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a bug may well overflow
        trial: TraceTrial | LogitsTrial
        trial = LogitsTrial(trace, honest, arithmetic) if by_logits else TraceTrial(trace, honest, arithmetic)
        base = trial.honest()
        if base.explains and not by_logits and "logits" in trace.tensors and not overflow:
            whole = LogitsTrial(_only_logits(trace), honest, arithmetic)
            alone = whole.honest()
            if not alone.explains:  # many small errors in one direction, none of them outside its own bound
                trial, by_logits, base = whole, True, alone
                notes += ("each operation is inside its bound, but the logits, which all of them lead to, are not",)
        return Diagnosis(
            causes=() if base.explains else tuple(_causes(trial, honest, base, pairs, progress)),
            honest=base,
            basis="logits" if by_logits else "trace",
            arithmetic=arithmetic,
            closer=_closer(trial) if base.explains and isinstance(trial, TraceTrial) else (),
            fed=_fed(trace),
            pairs=pairs,
            overflow=overflow,
            notes=notes,
        )


def _recognised(params: Params, config: Config, trace: Trace) -> tuple[str, str, Trace]:
    """The arithmetic of a candidate, how it was recognised, and the trace with the formats to judge it by."""
    if not fits(trace.tokens, trace):  # other tokens were fed
        return *recognised_arithmetic(trace), trace
    return judged_as_recognised(params, config, trace)[:3]


def _only_logits(trace: Trace) -> Trace:
    """The logits without the rest of a trace."""
    meta = {**trace.meta, "last": "true"} if trace.is_cut("logits") else trace.meta
    return replace(trace, tensors={"logits": trace.tensors["logits"]}, ends=frozenset(), meta=meta)


def _causes(
    trial: TraceTrial | LogitsTrial, honest: Setup, base: Cause, with_pairs: bool, progress: Progress | None
) -> list[Cause]:
    """Every explanation that was tried, best first."""
    singles: list[tuple[Bug, ...]]
    singles = [(bug,) for bug in BUGS if trial.may_show(bug) and bug.setups(honest)]
    causes = _in_place_of(trial.causes(singles, progress), trial.in_some_places())
    # Some bugs loosen bounds: one that fits, and is hardly closer than the reference, may hide another.
    if with_pairs and not any(cause.explains and cause.misfit * CLOSER <= base.misfit for cause in causes):
        alone = {cause.keys[0]: cause.misfit for cause in causes if cause.explains}
        both: list[tuple[Bug, ...]]
        both = [pair for pair in combinations([single[0] for single in singles], 2) if with_bugs(honest, pair)]
        found = _in_place_of(trial.causes(trial.worth_trying(both), progress), trial.in_some_places(pairs=True))
        causes += [
            pair for pair in found if not any(alone.get(key, math.inf) <= TIE * pair.misfit for key in pair.keys)
        ]
    return sorted(causes, key=lambda cause: (len(cause.left), cause.misfit, cause.ratio))


def _in_place_of(causes: list[Cause], placed: list[Cause]) -> list[Cause]:
    """Causes and placed ones, without those that a placed one replaces: it explains everything, and says more."""
    better = {frozenset(cause.keys) for cause in placed if cause.explains}
    return [cause for cause in causes if frozenset(cause.keys) not in better] + placed


def _closer(trial: TraceTrial) -> tuple[Cause, ...]:
    """Where nothing is wrong: bugs that come closer to the candidate; of several for one operation the closest."""
    closer = [cause for bug in BUGS if (cause := trial.closer(bug)) is not None]
    best: dict[tuple[str, ...], Cause] = {}
    for cause in sorted(closer, key=lambda cause: cause.misfit):
        best.setdefault(cause.bugs[0].where, cause)
    return tuple(best.values())


def _finite(trace: Trace, config: Config) -> tuple[Trace, str]:
    """The tensors, read once, up to the first that overflows, or whose square would; and that one's name or ""."""
    if not trace.tensors:
        raise InputError("the candidate holds no tensor that is recognised: there is nothing to explain")
    kept: dict[str, Array] = {}
    for name in (name for name in names_of(config) if name in trace.tensors):
        if overflows(trace, name, OVERFLOW):
            if not kept:
                raise InputError(
                    f"the candidate's {name} holds NaN or overflows, and nothing before it is given to judge by"
                )
            return replace(trace, tensors=kept), name
        kept[name] = trace.tensors[name]
    return replace(trace, tensors=kept), ""


def _fed(trace: Trace) -> Bug | None:
    """What the tokens alone show: a text begins with <bos>, once."""
    for row, positions in zip(trace.tokens, trace.positions, strict=True):
        real = row[positions >= 0]
        if not real.size or positions[positions >= 0][0] != 0:
            continue  # nothing, or a later part of a text
        if real[0] != _BOS:
            return find("H1 missing")
        if real.size > 1 and real[1] == _BOS:
            return find("H1 double")
    return None
