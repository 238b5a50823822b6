"""Compare another engine's trace with the reference: which operation is the first that rounding does not explain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from refgemma.checkpoint.load import Progress
from refgemma.config import Config
from refgemma.gemma import Gemma, LoraNames
from refgemma.model import Params
from refgemma.numerics import Array
from refgemma.oracle.drift import drift
from refgemma.oracle.fingerprint import fingerprint
from refgemma.oracle.forced import judge_forced
from refgemma.oracle.models import read_theirs, weights_of
from refgemma.oracle.precision import arithmetic_of
from refgemma.oracle.report import Report
from refgemma.oracle.tensor_names import names_of, split_name
from refgemma.oracle.trace import Trace, read_trace
from refgemma.oracle.trace_file import is_ours
from refgemma.oracle.verdict import Finding

# What is followed from end to end.
_STREAM = ("embed", "attn.residual", "out", "final_norm", "logits")


def compare(
    a: Trace | str | Path | None,
    b: Trace | str | Path,
    *,
    model: Gemma | str | Path | None = None,
    lora: LoraNames = (),
    arithmetic: str | None = None,
    mapping: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Judge a trace, operation by operation.

    Parameters
    ----------
    a : Trace, str, Path or None
        Ours, which names the model and the tokens; None if `model` is given and `b` holds its tokens.
    b : Trace, str or Path
        What is judged: a file of ours, or of another engine, see `refgemma.oracle.foreign.read_foreign`.
    model : Gemma, str or Path, optional
        The model, where `a` does not tell; or the name of a revealing one, such as "reveal-gqa".
    lora : str or Path, or a sequence of them
        Adapters that the model ran with, as `refgemma.load` takes them.
    arithmetic : str, optional
        What `b` was computed in: "float32", "bfloat16", "float16", "float64", or a profile such as "bf16-deepmind". By
        default told from its numbers.
    mapping : mapping of str to str, optional
        Names of `b` to ours.
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
        If a file cannot be read, the traces are about different tokens or models, or it is not known which model.

    Notes
    -----
    Each operation is judged on their own inputs, so one error is one finding. The residual stream and the logits are
    also judged as each engine's own run made them, by a budget that is measured; for logits alone, this is all.
    """
    ours = _ours(a)
    if ours is None and model is None:
        raise ValueError("which model is it? give ours, a trace that names it, or the model itself")
    params, config = weights_of(_model(ours, model, lora), lora)
    if ours is not None and ours.config not in (None, config):
        raise ValueError(f"{_called(a)} is a trace of another model than {_called(model)}")
    if ours is not None and ours.meta.get("weights") and fingerprint(params) not in ("", ours.meta["weights"]):
        raise ValueError(f"{_called(a)} was traced with other weights than the model has now: make it again")
    if isinstance(b, Trace):
        theirs = b
    else:
        known = {} if ours is None else {"tokens": ours.tokens, "positions": ours.positions}
        theirs = read_theirs(b, model, config, mapping=mapping, **known)
    if ours is not None:
        theirs = _same_run(ours, theirs, _called(b))
    if not theirs.tensors and not theirs.ends:
        raise ValueError(f"{_called(b)} holds no tensor: there is nothing to judge")
    guess, why = arithmetic_of(theirs)
    judged_as = arithmetic or guess
    findings, drifts = _judged(params, config, theirs, judged_as, progress)
    if theirs.ends:
        tail, tail_drifts = _judged(params, config, _end(theirs), judged_as, None)
        at_the_end = {one.name: one for one in tail if one.name in theirs.ends}
        findings = [at_the_end.get(one.name, one) for one in findings] or list(at_the_end.values())
        drifts += [one for one in tail_drifts if one.name in theirs.ends]
    return Report(
        theirs=_called(b),
        model=_called(model) if model is not None else (ours.meta["model"] if ours else ""),
        shape=(theirs.tokens.shape[0], theirs.tokens.shape[1]),
        arithmetic=judged_as if arithmetic else f"{guess} ({why})",
        findings=tuple(findings),
        drifts=tuple(drifts),
        notes=theirs.notes,
    )


def _judged(
    params: Params, config: Config, theirs: Trace, arithmetic: str, progress: Progress | None
) -> tuple[list[Finding], list[Finding]]:
    """Every tensor on their own inputs, unless logits are all there is; and the stream from end to end."""
    findings = []
    if set(theirs.tensors) != {"logits"}:
        findings = judge_forced(params, config, theirs, arithmetic, progress=progress)
    stream = [name for name in names_of(config) if split_name(name)[1] in _STREAM]
    return findings, drift(params, config, theirs, arithmetic, names=stream)


def _end(theirs: Trace) -> Trace:
    """What was given of the last positions alone, with the stream that it was made from."""
    rows = np.arange(len(theirs.tokens))
    last = theirs.tokens.shape[1] - 1 - (theirs.positions[:, ::-1] >= 0).argmax(axis=1)
    stream = [name for name in theirs.tensors if name == "final_norm" or split_name(name)[1] == "out"]
    tensors = {name: theirs.tensors[name][rows, last][:, None] for name in stream} | dict(theirs.ends)
    return replace(theirs, tensors=tensors, ends={}, meta={**theirs.meta, "last": "true"})


def _ours(a: Trace | str | Path | None) -> Trace | None:
    if a is None or isinstance(a, Trace):
        return a
    if Path(a).is_file() and not is_ours(a):
        raise ValueError(
            f"{a} is no trace of refgemma: give ours first, or the model and the other engine's file alone"
        )
    return read_trace(a)


def _model(ours: Trace | None, model: Gemma | str | Path | None, lora: LoraNames) -> Gemma | str | Path:
    """Which model it is."""
    if model is None and ours is not None:
        model = ours.meta.get("model")
        if ours.meta.get("adapters", "[]") != "[]" and not lora:
            raise ValueError(f"ours was traced with the adapters {ours.meta['adapters'][1:-1]}: give them, too")
    if not model:
        raise ValueError("which model is it? ours does not name it (`trace(..., model=)`): give the model")
    return model


def _same_run(ours: Trace, theirs: Trace, name: str) -> Trace:
    """Theirs with our positions, once it is sure that both are about the same tokens."""
    if not np.array_equal(ours.tokens, theirs.tokens):
        raise ValueError(f"{name} is about other tokens than ours: {_first_difference(ours.tokens, theirs.tokens)}")
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
