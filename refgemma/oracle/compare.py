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
from refgemma.oracle.judging.selection import (
    judged_as_recognised,
    judged_operations,
    judged_run,
    without_the_last_token,
)
from refgemma.oracle.models import read_candidate, weights_of
from refgemma.oracle.report import Report
from refgemma.oracle.traces.recording import fingerprint
from refgemma.oracle.traces.trace import Trace, first_difference, is_trace, read_trace_file


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
        The reference trace, which names the model and the tokens; None if `model` is given and `b` holds its tokens.
    b : Trace, str or Path
        The candidate: a trace of refgemma or of another engine, see `refgemma.oracle.foreign.reader.read_foreign`.
    model : Gemma, str or Path, optional
        The model, where `a` does not name it; or the name of a formula model, such as "reveal-gqa".
    lora : str or Path, or a sequence of them
        Adapters that the model ran with, as `refgemma.load` takes them.
    arithmetic : str, optional
        What `b` was computed in: "float32", "bfloat16", "float16", "float64", or a profile such as "bf16-deepmind". By
        default recognised from its numbers.
    mapping : mapping of str to str, optional
        Names in `b` to names of the reference.
    tokens : array_like of int, shape (T,) or (B, T), optional
        What was fed, where neither `a` nor `b` says; for a formula model, its own batch by default.
    progress : callable, optional
        ``progress(done, total)``, in layers.

    Returns
    -------
    Report
        The first divergence, a finding on every tensor, and how far the whole run drifted.

    Raises
    ------
    FileNotFoundError
        If a file or the model does not exist.
    ValueError
        If a file cannot be read, the traces have different tokens or models, the model is not known, or the last token
        was never fed.

    Notes
    -----
    Each operation is judged on the candidate's own inputs, so one error is one finding; `THEORY.md` derives the bounds.
    The residual stream and the logits are also judged as each engine's own run made them, by a budget that is measured;
    for logits alone, this is all.

    Where the arithmetic is not given, and the one recognised makes half of all kinds of operation wrong, the numbers
    may have been computed in float32 and only stored so: if that explains them, they are judged so, and the report says
    it.
    """
    reference = _reference(a)
    if reference is not None and tokens is not None:
        raise InputError("the reference trace says which tokens were fed: no others can be given")
    if reference is None and model is None:
        raise InputError("no model is given: give a reference trace that names it, or the model itself")
    params, config = weights_of(_model(reference, model, lora), lora)
    if reference is not None and reference.config not in (None, config):
        raise InputError(f"{_called(a)} is a trace of another model than {_called(model)}")
    made_with = "" if reference is None else reference.meta.get("weights", "")
    if made_with and fingerprint(params) not in ("", made_with):
        raise InputError(f"{_called(a)} was traced with other weights than the model has now: trace it again")
    if isinstance(b, Trace):
        candidate = b
    elif reference is None:
        candidate = read_candidate(b, model, config, mapping=mapping, tokens=tokens)
    else:
        fed = {"tokens": reference.tokens, "positions": reference.positions}
        candidate = read_candidate(b, model, config, mapping=mapping, **fed)
    if reference is not None:
        candidate = _same_run(reference, candidate, _called(b))
    if not candidate.tensors:
        raise InputError(f"{_called(b)} holds no tensor: there is nothing to judge")
    if not (candidate.positions >= 0).any():
        raise InputError(f"{_called(b)}: every position is padding (-1, or masked): there is nothing to judge")
    if arithmetic is None:
        arithmetic, why, candidate, findings = judged_as_recognised(params, config, candidate, progress)
        judged_as = f"{arithmetic} ({why})"
    else:
        judged_as, findings = arithmetic, judged_operations(params, config, candidate, arithmetic, progress)
    drifts = judged_run(params, config, candidate, arithmetic)
    if not findings and not all(one.ok for one in drifts):
        shorter = without_the_last_token(candidate)
        if shorter is not None and all(one.ok for one in judged_run(params, config, shorter, arithmetic)):
            T = candidate.tokens.shape[1]
            raise InputError(
                f"{_called(b)}: {T - 1} positions were fed, {T} tokens given, for its logits are right one position "
                "earlier: give the tokens that were fed, without the one drawn last"
            )
    return Report(
        candidate=_called(b),
        model=_called(model) if model is not None else (reference.meta["model"] if reference else ""),
        shape=(candidate.tokens.shape[0], candidate.tokens.shape[1]),
        arithmetic=judged_as,
        findings=tuple(findings),
        drifts=tuple(drifts),
        notes=candidate.notes,
    )


def _reference(a: Trace | str | Path | None) -> Trace | None:
    if a is None or isinstance(a, Trace):
        return a
    if Path(a).is_file() and not is_trace(a):
        raise InputError(
            f"{a} is not a trace written by refgemma: give one first, or only the other engine's file and the model"
        )
    return read_trace_file(a)


def _model(reference: Trace | None, model: Gemma | str | Path | None, lora: LoraNames) -> Gemma | str | Path:
    """Which model it is."""
    if model is None and reference is not None:
        model = reference.meta.get("model")
        if reference.meta.get("adapters", "[]") != "[]" and not lora:
            adapters = reference.meta["adapters"][1:-1]
            raise InputError(f"the reference trace was made with the adapters {adapters}: give them as well")
    if not model:
        raise InputError("the reference trace does not name its model (`trace(..., model=)`): give the model")
    return model


def _same_run(reference: Trace, candidate: Trace, name: str) -> Trace:
    """The candidate with the reference's positions, once it is sure that both have the same tokens."""
    if not np.array_equal(reference.tokens, candidate.tokens):
        difference = first_difference(candidate.tokens, reference.tokens)
        raise InputError(f"{name} has other tokens than the reference trace: {difference}")
    if np.array_equal(reference.positions, candidate.positions):
        return candidate
    note = "has other positions than the reference trace, which it is judged by"
    return replace(candidate, positions=reference.positions, notes=(*candidate.notes, note))


def _called(what: Trace | Gemma | str | Path | None) -> str:
    """Name for messages."""
    if isinstance(what, Trace):
        return what.meta.get("file", "the trace")
    return "the model given" if what is None or isinstance(what, Gemma) else str(what)
