"""What rounding to a storage format does to one merged weight.

A merged weight is ``round(W + d)``. Where d is smaller than half the distance of W to its neighbour in the format,
rounding gives W back and the update is gone; where it is not, the step is as wide as that distance. Of bfloat16, with 8
significant bits, neighbours differ by 1 in 128 to 256, of which the updates of fine-tuning are a small part.

References
----------
Roy and Vetterli, "The Effective Rank: A Measure of Effective Dimensionality", EUSIPCO 2007, eq. 4. There the weights of
the entropy are the singular values themselves; here they are their squares, the shares of the squared Frobenius norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from refgemma.compute.threads import mapped
from refgemma.lora.materialise import Term, change, check_finite, taken_apart, wide_rows
from refgemma.lora.pieces import pieces
from refgemma.lora.rounding import format_of, rounded, widened
from refgemma.numerics import Array
from refgemma.ops.linear import Operand


@dataclass(frozen=True, kw_only=True)
class WeightAudit:
    """What rounding does to one merged weight W + d."""

    path: str  # the weight, such as ``layers.0.attn.q``; ``all`` for all that are changed together
    shape: tuple[int, ...]  # its axes
    # rank that the factors have room for; None for a weight that was trained whole. The three ranks are those of the
    # low-rank part, which DoRA's gain turns into a change of full rank
    rank: int | None
    # ``exp(-sum p ln p)`` with p the squared singular values over their sum: how many directions share the update
    effective_rank: float | None
    numerical_rank: int | None  # singular values above ``max(O, I) * 2**-52`` times the largest
    relative_norm: float  # frobenius norm of d over that of W
    unmoved: float  # share of weights with ``round(W + d) == round(W)`` among those where d is not 0; NaN if d is 0
    update_error: float  # ``||round(W + d) - W - d|| / ||d||``: 0 is a faithful merge, 1 as bad as none; NaN if d is 0


class Sums(NamedTuple):
    """Of one weight, or a part of it: squares of W, of d and of the error; how many d are not 0, how many were lost."""

    weight: float
    change: float
    error: float
    touched: float
    unmoved: float


def added(parts: Iterable[Sums]) -> Sums:
    """Sums of parts, taken together."""
    return Sums(*(math.fsum(column) for column in zip(Sums(0, 0, 0, 0, 0), *parts, strict=True)))


def audit_weight(
    path: str, new: Operand, old: Operand, form: str, report: Callable[[int], None]
) -> tuple[WeightAudit, Sums]:
    """Measure what rounding does to one merged weight. old (O, I)."""
    plain, terms = taken_apart(new, table=path == "embed")

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
    all_rows = list(pieces(old.shape, slice(0, old.shape[0])))
    for part, rows in zip(mapped(one, all_rows), all_rows, strict=True):
        parts.append(part)
        report(rows.stop * math.prod(old.shape[1:]))
    sums = added(parts)
    return row_of(path, tuple(old.shape), sums, singular_values(terms) if terms else None), sums


def row_of(path: str, shape: tuple[int, ...], sums: Sums, singular: Array | None = None) -> WeightAudit:
    """Shares and ratios from sums. singular (R,)."""
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
    values of the small matrix in the middle. Nothing of the size of the weight is ever made.
    """
    ups, downs = [], []
    filled = np.any([term.up.any(axis=1) for term in terms], axis=0)  # of new rows of a table, few are
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
    """Number of directions that share a matrix: the exponential of the entropy of its squared singular values.

    singular (R,).
    """
    if not singular.any():
        return 0.0
    shares = np.square(singular / singular.max())
    shares = shares[shares > 0] / shares.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))
