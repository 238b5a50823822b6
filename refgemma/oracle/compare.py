"""Compare another engine's trace with the reference: which operation is the first that rounding does not explain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from refgemma.checkpoint.load import Progress
from refgemma.errors import InputError
from refgemma.gemma import Gemma, LoraNames
from refgemma.numerics import Array
from refgemma.oracle.judging.selection import (
    judged_as_recognised,
    judged_operations,
    judged_run,
    without_the_last_token,
)
from refgemma.oracle.models import read_theirs, weights_of
from refgemma.oracle.reporting.report import Report
from refgemma.oracle.traces.file import is_trace
from refgemma.oracle.traces.fingerprint import fingerprint
from refgemma.oracle.traces.trace import Trace, read_trace


def compare(
    a: Trace | str | Path | None,
    b: Trace | str | Path,
    *,
    model: Gemma | str | Path | None = None,
    lora: LoraNames = (),
    arithmetic: str | None = None,
    mapping: Mapping[str, str] | None = None,
    tokens: ArrayLike | None = None,
    progress: Progress | None = None,
) -> Report:
    """Judge a trace, operation by operation.

    Parameters
    ----------
    a : Trace, str, Path or None
        Ours, which names the model and the tokens; None if `model` is given and `b` holds its tokens.
    b : Trace, str or Path
        What is judged: a file of ours, or of another engine, see `refgemma.oracle.foreign.reader.read_foreign`.
    model : Gemma, str or Path, optional
        The model, where `a` does not tell; or the name of a revealing one, such as "reveal-gqa".
    lora : str or Path, or a sequence of them
        Adapters that the model ran with, as `refgemma.load` takes them.
    arithmetic : str, optional
        What `b` was computed in: "float32", "bfloat16", "float16", "float64", or a profile such as "bf16-deepmind". By
        default told from its numbers.
    mapping : mapping of str to str, optional
        Names of `b` to ours.
    tokens : array_like of int, shape (T,) or (B, T), optional
        What was fed, where neither `a` nor `b` says; for a revealing model, its own batch by default.
    progress : callable, optional
        ``progress(done, total)``, in layers.

    Returns
    -------
    Report
        The first divergence, a finding on every tensor, and how far the whole run drifted.

    Raises
    ------
    FileNotFoundError
        If a file or the model is not there.
    ValueError
        If a file cannot be read, the traces are about different tokens or models, it is not known which model, or the
        last token was never fed.

    Notes
    -----
    Each operation is judged on their own inputs, so one error is one finding. The residual stream and the logits are
    also judged as each engine's own run made them, by a budget that is measured; for logits alone, this is all.

    Where the arithmetic is not given, and what was told from the numbers makes half of all kinds of operation wrong,
    they may have been computed in float32 and only stored so: if that explains it, it is judged so, and said.
    """
    ours = _ours(a)
    if ours is not None and tokens is not None:
        raise InputError("ours says which tokens were fed: give no others")
    if ours is None and model is None:
        raise InputError("which model is it? give ours, a trace that names it, or the model itself")
    params, config = weights_of(_model(ours, model, lora), lora)
    if ours is not None and ours.config not in (None, config):
        raise InputError(f"{_called(a)} is a trace of another model than {_called(model)}")
    if ours is not None and ours.meta.get("weights") and fingerprint(params) not in ("", ours.meta["weights"]):
        raise InputError(f"{_called(a)} was traced with other weights than the model has now: make it again")
    if isinstance(b, Trace):
        theirs = b
    else:
        known = {"tokens": tokens} if ours is None else {"tokens": ours.tokens, "positions": ours.positions}
        theirs = read_theirs(b, model, config, mapping=mapping, **known)
    if ours is not None:
        theirs = _same_run(ours, theirs, _called(b))
    if not theirs.tensors:
        raise InputError(f"{_called(b)} holds no tensor: there is nothing to judge")
    if not (theirs.positions >= 0).any():
        raise InputError(f"{_called(b)}: every position is padding (-1, or masked): there is nothing to judge")
    if arithmetic is None:
        arithmetic, why, theirs, findings = judged_as_recognised(params, config, theirs, progress)
        judged_as = f"{arithmetic} ({why})"
    else:
        judged_as, findings = arithmetic, judged_operations(params, config, theirs, arithmetic, progress)
    drifts = judged_run(params, config, theirs, arithmetic)
    if not findings and not all(one.ok for one in drifts):
        shorter = without_the_last_token(theirs)
        if shorter is not None and all(one.ok for one in judged_run(params, config, shorter, arithmetic)):
            T = theirs.tokens.shape[1]
            raise InputError(
                f"{_called(b)}: {T - 1} positions were fed, {T} tokens given, for its logits are right one position "
                "earlier: give the tokens that were fed, without what was drawn last"
            )
    return Report(
        theirs=_called(b),
        model=_called(model) if model is not None else (ours.meta["model"] if ours else ""),
        shape=(theirs.tokens.shape[0], theirs.tokens.shape[1]),
        arithmetic=judged_as,
        findings=tuple(findings),
        drifts=tuple(drifts),
        notes=theirs.notes,
    )


def _ours(a: Trace | str | Path | None) -> Trace | None:
    if a is None or isinstance(a, Trace):
        return a
    if Path(a).is_file() and not is_trace(a):
        raise InputError(
            f"{a} is no trace of refgemma: give ours first, or the model and the other engine's file alone"
        )
    return read_trace(a)


def _model(ours: Trace | None, model: Gemma | str | Path | None, lora: LoraNames) -> Gemma | str | Path:
    """Which model it is."""
    if model is None and ours is not None:
        model = ours.meta.get("model")
        if ours.meta.get("adapters", "[]") != "[]" and not lora:
            raise InputError(f"ours was traced with the adapters {ours.meta['adapters'][1:-1]}: give them, too")
    if not model:
        raise InputError("which model is it? ours does not name it (`trace(..., model=)`): give the model")
    return model


def _same_run(ours: Trace, theirs: Trace, name: str) -> Trace:
    """Theirs with our positions, once it is sure that both are about the same tokens."""
    if not np.array_equal(ours.tokens, theirs.tokens):
        raise InputError(f"{name} is about other tokens than ours: {_first_difference(ours.tokens, theirs.tokens)}")
    if np.array_equal(ours.positions, theirs.positions):
        return theirs
    note = "gives other positions than ours, which it is judged by"
    return replace(theirs, positions=ours.positions, notes=(*theirs.notes, note))


def _called(what: Trace | Gemma | str | Path | None) -> str:
    """Name for messages."""
    if isinstance(what, Trace):
        return what.meta.get("file", "the trace")
    return "the model given" if what is None or isinstance(what, Gemma) else str(what)


def _first_difference(ours: Array, theirs: Array) -> str:
    if ours.shape != theirs.shape:
        return f"theirs have shape {theirs.shape}, ours {ours.shape}"
    b, t = (int(i) for i in np.argwhere(ours != theirs)[0])
    return f"row {b} has {int(theirs[b, t])} at {t}, ours {int(ours[b, t])}"
