"""What merging adapters costs: the share of the update that rounding loses, and what that does to the logits.

A merged weight is ``round(W + d)``. Where d is smaller than half the distance of W to its neighbour in the format,
rounding gives W back and the update is lost; elsewhere the step is as wide as that distance. bfloat16 has 8 significant
bits: neighbours differ by 1 part in 128 to 256, and the updates of fine-tuning are much smaller.

References
----------
Roy and Vetterli, "The Effective Rank: A Measure of Effective Dimensionality", EUSIPCO 2007, eq. 4. There the weights of
the entropy are the singular values themselves; here they are their squares, the shares of the squared Frobenius norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike

from refgemma.checkpoint.load import Progress
from refgemma.checkpoint.names import tensors_of
from refgemma.compute.threads import mapped
from refgemma.config import Config
from refgemma.device import placed
from refgemma.errors import InputError
from refgemma.lora.adapter import Adapter
from refgemma.lora.merge import Term, change, check_finite, materialise, naming, split
from refgemma.lora.tiles import FORMATS, format_of, rounded, tiles, wide_rows, widened
from refgemma.numerics import Array, namespace_of
from refgemma.ops.linear import Adapted, Operand
from refgemma.params import Params, at, replaced

Changed: TypeAlias = list[tuple[str, Operand, Operand]]  # path, new, old


class Model(Protocol):
    """The part of a `Gemma` that an audit uses; `refgemma.gemma` imports this package, not the other way round."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def config(self) -> Config: ...

    @property
    def params(self) -> Params: ...

    def with_lora(self, adapter: Adapter, scale: float = 1.0) -> Self: ...

    def logits(self, tokens: ArrayLike) -> Array: ...


@dataclass(frozen=True, kw_only=True)
class WeightAudit:
    """What rounding does to one merged weight W + d."""

    path: str  # the weight, such as ``layers.0.attn.q``; ``all`` for all changed weights together
    shape: tuple[int, ...]
    # The three ranks are of the low-rank part, before DoRA's gain; None for a weight that was trained whole.
    rank: int | None  # of the factors' shape
    effective_rank: float | None  # ``exp(-sum p ln p)``, p the squared singular values over their sum
    numerical_rank: int | None  # number of singular values above ``max(O, I) * 2**-52`` times the largest
    relative_norm: float  # Frobenius norm of d over that of W
    unmoved: float  # share of weights with ``round(W + d) == round(W)`` among those where d is not 0; NaN if d is 0
    update_error: float  # ``||round(W + d) - W - d|| / ||d||``: 0 is a faithful merge, 1 as bad as none; NaN if d is 0


class Sums(NamedTuple):
    """Sums over a weight, or a part of it."""

    weight: float  # of squares of W
    change: float  # of squares of d
    error: float  # of squares of round(W + d) - W - d
    touched: float  # number of d that are not 0
    unmoved: float  # of these, number lost to rounding


@dataclass(frozen=True, kw_only=True)
class LogitChange:
    """Distance of logits from those with the adapter attached, over all positions of a prompt."""

    model: str  # whose logits: "base", or "merged in" a format
    max_abs: float  # largest difference
    mean_kl: float  # Kullback-Leibler divergence from the attached model's probabilities, in nats, mean over positions
    flips: int  # number of positions where another token is the most likely
    positions: int


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What merging an adapter costs."""

    dtype: str  # format that merged weights are rounded to
    weights: tuple[WeightAudit, ...]  # one per changed weight
    total: WeightAudit  # all of them as one, without ranks
    logits: tuple[LogitChange, ...]  # of the base, merged in float32, merged in `dtype`; empty without tokens


def audit(
    gemma: Model,
    adapter: Adapter,
    scale: float = 1.0,
    dtype: str = "bfloat16",
    tokens: ArrayLike | None = None,
    *,
    progress: Progress | None = None,
) -> Audit:
    """Measure what merging an adapter loses.

    Parameters
    ----------
    gemma : Gemma
        The base, with nothing attached.
    adapter : Adapter
        From `refgemma.lora.read`.
    scale : float
        Weight of its changes.
    dtype : {"bfloat16", "float16", "float32"}
        Format to store merged weights in.
    tokens : array_like of int, shape (T,), optional
        A prompt to compare logits on. Takes memory for the logits of all positions and for the merged weights.
    progress : callable, optional
        Called as ``progress(done, total)``, in numbers of weights.

    Returns
    -------
    Audit
        One row per changed weight, and the change of logits if there are tokens.

    Raises
    ------
    ValueError
        If the adapter does not fit or cannot be merged, or `gemma` has an adapter already.

    Notes
    -----
    If `gemma` holds wider numbers than `dtype`, rounding the base itself counts as an error of the update.
    """
    return audit_attached(gemma, gemma.with_lora(adapter, scale), dtype, tokens, progress=progress)


def audit_attached(
    gemma: Model,
    attached: Model,
    dtype: str = "bfloat16",
    tokens: ArrayLike | None = None,
    *,
    progress: Progress | None = None,
) -> Audit:
    """Measure what merging all attached adapters loses."""
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

        with naming(path):
            row, parts = audit_weight(path, new, old, dtype, report)
        rows.append(row)
        sums.append(parts)
        done += math.prod(old.shape)
    logits = () if prompt is None else tuple(logit_changes(gemma, attached, changed, dtype, prompt))
    return Audit(dtype=dtype, weights=tuple(rows), total=row_of("all", (total,), added(sums)), logits=logits)


def _changed(params: Params, before: Params, config: Config) -> Iterator[tuple[str, Operand, Operand]]:
    """Path, new and old of each changed weight."""
    for tensor in tensors_of(replace(config, tie_word_embeddings=False)):
        new, old = at(params, tensor.path), at(before, tensor.path)
        if isinstance(old, Adapted):
            raise InputError(f"{tensor.path} has an adapter already: audit the model without it")
        if new is not old:
            yield tensor.path, new, old


# ---- weights


def added(parts: Iterable[Sums]) -> Sums:
    """Sum of sums."""
    return Sums(*(math.fsum(column) for column in zip(Sums(0, 0, 0, 0, 0), *parts, strict=True)))


def audit_weight(
    path: str, new: Operand, old: Operand, form: str, report: Callable[[int], None]
) -> tuple[WeightAudit, Sums]:
    """Measure what rounding does to one merged weight."""
    plain, terms = split(new, table=path == "embed")

    def one(rows: slice) -> Sums:
        base = wide_rows(cast(Any, old), rows)
        if plain is old:
            delta = change(terms, base, rows)
        else:  # trained whole, perhaps with factors on top
            whole = wide_rows(plain, rows)
            delta = whole - base + change(terms, whole, rows)
        stored = rounded(base + delta, form)
        check_finite(stored, base + delta, base, form, rows)
        merged = widened(stored, form)
        kept = base if format_of(old) == form else widened(rounded(base, form), form)
        touched = delta != 0
        unmoved = touched & (merged == kept)
        w2, d2, e2 = (float(np.square(x).sum()) for x in (base, delta, merged - base - delta))
        return Sums(w2, d2, e2, int(touched.sum()), int(unmoved.sum()))

    parts: list[Sums] = []
    for part, rows in zip(mapped(one, tiles(old.shape)), tiles(old.shape), strict=True):
        parts.append(part)
        report(rows.stop * math.prod(old.shape[1:]))
    sums = added(parts)
    return row_of(path, tuple(old.shape), sums, singular_values(terms) if terms else None), sums


def row_of(path: str, shape: tuple[int, ...], sums: Sums, singular: Array | None = None) -> WeightAudit:
    """Shares and ratios from sums, and ranks from singular values (R,)."""
    rank = effective = numerical = None
    if singular is not None:
        rank, effective = len(singular), effective_rank(singular)
        numerical = int(np.sum(singular > max(shape) * np.finfo(np.float64).eps * singular.max(initial=0.0)))
    return WeightAudit(
        path=path,
        shape=shape,
        rank=rank,
        effective_rank=effective,
        numerical_rank=numerical,
        relative_norm=float(np.sqrt(sums.change / sums.weight)) if sums.weight else float("nan"),
        unmoved=sums.unmoved / sums.touched if sums.touched else float("nan"),
        update_error=float(np.sqrt(sums.error / sums.change)) if sums.change else float("nan"),
    )


def singular_values(terms: tuple[Term, ...]) -> Array:
    """Singular values of a sum of low-rank products, from its factors alone.

    With ``B = Q S`` and ``A^T = P T`` (Q and P with orthonormal columns), ``B A = Q (S T^T) P^T`` has the singular
    values of the small matrix in the middle, so no matrix of the size of the weight is needed.
    """
    ups, downs = [], []
    filled = np.any([term.up.any(axis=1) for term in terms], axis=0)  # few, if these are new rows of a table
    for term in terms:
        up, down = term.scale * term.up[filled].astype(np.float64), term.down
        if term.gain is not None:
            up, down = (up * term.gain[filled], down) if term.gain.shape[1] == 1 else (up, down * term.gain)
        ups.append(up)
        downs.append(down)
    s, t = (np.asarray(np.linalg.qr(x, mode="r")) for x in (np.concatenate(ups, axis=1), np.concatenate(downs).T))
    values: Array = np.linalg.svd(s @ t.T, compute_uv=False)
    room = min(len(filled), downs[0].shape[1], sum(map(len, downs)))
    return np.concatenate([values, np.zeros(room - len(values))])


def effective_rank(singular: Array) -> float:
    """Number of directions that share a matrix: the exponential of the entropy of its squared singular values."""
    if not singular.any():
        return 0.0
    shares = np.square(singular / singular.max())
    shares = shares[shares > 0] / shares.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


# ---- logits


def logit_changes(gemma: Model, attached: Model, changed: Changed, dtype: str, tokens: Array) -> Iterator[LogitChange]:
    """Compare the logits of a prompt with those of the attached model."""
    want = attached.logits(tokens)
    yield _logit_change("base", gemma.logits(tokens), want)
    for form in dict.fromkeys(("float32", dtype)):
        merged = replace(gemma, params=_with_weights(gemma.params, changed, form))
        yield _logit_change(f"merged in {form}", merged.logits(tokens), want)


def _logit_change(model: str, logits: Array, want: Array) -> LogitChange:
    largest, total, flips = 0.0, 0.0, 0
    for row, wanted in zip(logits, want, strict=True):  # one position at a time: V may be a quarter of a million
        shifted = (x.astype(np.float64) - np.max(x) for x in (wanted, row))
        log_p, log_q = (x - np.log(np.exp(x).sum()) for x in shifted)
        largest = max(largest, float(np.abs(row - wanted).max()))
        total += float(np.sum(np.exp(log_p) * (log_p - log_q)))
        flips += int(np.argmax(row) != np.argmax(wanted))
    return LogitChange(model=model, max_abs=largest, mean_kl=total / len(want), flips=flips, positions=len(want))


def _with_weights(params: Params, changed: Changed, form: str) -> Params:
    """Parameters with the changed weights merged in a format, and widened again if the model holds a wider one."""
    weights = {}
    for path, new, old in changed:
        weight = materialise(new, form, table=path == "embed")
        kept = format_of(old)
        if FORMATS.index(kept) > FORMATS.index("float16") and FORMATS.index(kept) > FORMATS.index(form):
            weight = materialise(weight, kept)  # the same numbers by the same arithmetic
        weights[path] = weight
    return placed(replaced(params, weights), namespace_of(params["final_norm"]))
