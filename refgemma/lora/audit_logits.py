"""How a merge changes what the model says: logits of merged weights against those with the adapter attached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from refgemma.device import placed
from refgemma.lora.materialise import materialise
from refgemma.lora.paths import branched, put
from refgemma.lora.rounding import FORMATS, format_of
from refgemma.model import Params
from refgemma.numerics import Array, namespace_of
from refgemma.ops.linear import Operand

if TYPE_CHECKING:
    from refgemma.gemma import Gemma

Changed: TypeAlias = list[tuple[str, Operand, Operand]]  # path, new, old


@dataclass(frozen=True, kw_only=True)
class LogitChange:
    """How far logits are from those with the adapter attached, over all positions of a prompt."""

    model: str  # whose logits: "base", or "merged in" a format
    max_abs: float  # largest difference
    mean_kl: float  # kullback-Leibler divergence from the attached model's probabilities, in nats; mean over positions
    flips: int  # positions at which another token is the most likely
    positions: int  # how many there are


def logit_changes(gemma: Gemma, attached: Gemma, changed: Changed, dtype: str, tokens: Array) -> Iterator[LogitChange]:
    """Compare the logits of a prompt. tokens (T,)."""
    want = attached.logits(tokens)
    yield _logit_change("base", gemma.logits(tokens), want)
    for form in dict.fromkeys(("float32", dtype)):
        merged = replace(gemma, params=_with_weights(gemma.params, changed, form))
        yield _logit_change(f"merged in {form}", merged.logits(tokens), want)


def _logit_change(model: str, logits: Array, want: Array) -> LogitChange:
    largest, total, flips = 0.0, 0.0, 0
    for row, wanted in zip(logits, want, strict=True):  # one position at a time: V may be a quarter of a million
        ours, theirs = (x.astype(np.float64) - np.max(x) for x in (row, wanted))
        log_p, log_q = (x - np.log(np.exp(x).sum()) for x in (theirs, ours))
        largest = max(largest, float(np.abs(row - wanted).max()))
        total += float(np.sum(np.exp(log_p) * (log_p - log_q)))
        flips += int(np.argmax(row) != np.argmax(wanted))
    return LogitChange(model=model, max_abs=largest, mean_kl=total / len(want), flips=flips, positions=len(want))


def _with_weights(params: Params, changed: Changed, form: str) -> Params:
    """Parameters with the changed weights merged in a format, and widened again if the model is kept in a wider one."""
    tree = branched(params)
    for path, new, old in changed:
        weight = materialise(new, form, table=path == "embed")
        kept = format_of(old)
        if FORMATS.index(kept) > FORMATS.index("float16") and FORMATS.index(kept) > FORMATS.index(form):
            weight = materialise(weight, kept)  # the same numbers by the same arithmetic
        put(tree, path, weight)
    return placed(tree, namespace_of(params["final_norm"]))
