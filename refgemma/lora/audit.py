"""What merging adapters costs: weight by weight what rounding leaves of the update, and what becomes of the logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from refgemma.checkpoint.load import Progress
from refgemma.checkpoint.names import tensors_of
from refgemma.config import Config
from refgemma.errors import InputError
from refgemma.lora.audit_logits import LogitChange, logit_changes
from refgemma.lora.audit_weights import WeightAudit, added, audit_weight, row_of
from refgemma.lora.paths import at
from refgemma.lora.read import Adapter
from refgemma.lora.rounding import FORMATS
from refgemma.model import Params
from refgemma.ops.linear import Adapted, Operand

if TYPE_CHECKING:
    from refgemma.gemma import Gemma


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What merging an adapter costs."""

    dtype: str  # format that merged weights are rounded to
    weights: tuple[WeightAudit, ...]  # one for each weight that the adapter changes
    total: WeightAudit  # all of them as one; without ranks
    logits: tuple[LogitChange, ...]  # empty if no tokens were given: the base, merged in float32, merged in `dtype`


def audit(
    gemma: Gemma,
    adapter: Adapter,
    scale: float = 1.0,
    dtype: str = "bfloat16",
    tokens: ArrayLike | None = None,
    *,
    progress: Progress | None = None,
) -> Audit:
    """Measure what merging an adapter would lose.

    Parameters
    ----------
    gemma : Gemma
        The base, nothing attached.
    adapter : Adapter
        From `refgemma.lora.read`.
    scale : float
        Weight of its changes.
    dtype : {"bfloat16", "float16", "float32"}
        Format that the merged weights would be stored in.
    tokens : array_like of int, shape (T,), optional
        A prompt for which to compare logits. They are kept for all positions, and the merged weights, too.
    progress : callable, optional
        Called as ``progress(done, total)``, in weights looked at.

    Returns
    -------
    Audit
        A row for each weight, and the change of logits if there are tokens.

    Raises
    ------
    ValueError
        If the adapter does not fit or cannot be merged, or something is attached already.

    Notes
    -----
    If `gemma` holds wider numbers than `dtype`, rounding the base itself counts as an error of the update.
    """
    return audit_attached(gemma, gemma.with_lora(adapter, scale), dtype, tokens, progress=progress)


def audit_attached(
    gemma: Gemma,
    attached: Gemma,
    dtype: str = "bfloat16",
    tokens: ArrayLike | None = None,
    *,
    progress: Progress | None = None,
) -> Audit:
    """Measure what merging all attached adapters would lose."""
    if dtype not in FORMATS[:-1]:
        raise InputError(f"dtype is {dtype!r}: expected {', '.join(FORMATS[:-1])}")
    prompt = None if tokens is None else np.asarray(tokens)
    if prompt is not None and prompt.ndim != 1:
        raise InputError(f"tokens have shape {prompt.shape}: expected (T,), one prompt")
    changed = list(_changed(attached.params, gemma.params, gemma.config))
    total = sum(math.prod(old.shape) for _, _, old in changed)
    done, rows, sums = 0, [], []
    for path, new, old in changed:

        def report(numbers: int, *, before: int = done) -> None:
            if progress:
                progress(before + numbers, total)

        try:
            row, parts = audit_weight(path, new, old, dtype, report)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        rows.append(row)
        sums.append(parts)
        done += math.prod(old.shape)
    logits = () if prompt is None else tuple(logit_changes(gemma, attached, changed, dtype, prompt))
    return Audit(dtype=dtype, weights=tuple(rows), total=row_of("all", (total,), added(sums)), logits=logits)


def _changed(params: Params, before: Params, config: Config) -> Iterator[tuple[str, Operand, Operand]]:
    """Path, new and old of each weight that is not the same object."""
    for tensor in tensors_of(replace(config, tie_word_embeddings=False)):
        new, old = at(params, tensor.ours), at(before, tensor.ours)
        if isinstance(old, Adapted):
            raise InputError(f"an adapter is on {tensor.ours} already: give the model without it, and what to add")
        if new is not old:
            yield tensor.ours, new, old
