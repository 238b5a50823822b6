"""The verdict on one tensor: how far it is from where it should be, how far it may be, and the grade that follows.

Inside rounding: no error is above what roundings that fall by chance add up to. Suspicious: above that, though not
above what the same roundings could do if all of them conspired. Wrong: no order of the same roundings explains it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Grade: TypeAlias = Literal["inside rounding", "suspicious", "wrong", "not given"]
GRADES: tuple[Grade, ...] = ("not given", "inside rounding", "suspicious", "wrong")


@dataclass(frozen=True)
class Finding:
    """Verdict on one named tensor.

    Parameters
    ----------
    name : str
        The tensor, such as ``layers.3.attn.q_rope``.
    grade : str
        "inside rounding", "suspicious", "wrong", or "not given" where the candidate lacks it.
    ratio : float
        Error over bound where that is largest; above 1 is wrong. NaN where not given.
    error, bound : float
        Both at that place; the bound is the worst case.
    where : tuple of int
        Index of that place in the tensor, batch row first.
    value_candidate, value_reference : float
        The candidate's number there, and what the reference computes from the candidate's inputs.
    pattern : str
        What the errors have in common, such as "constant factor 0.99985"; empty if nothing or if all is well.
    reason : str
        Where the bound comes from, in words.
    likely : float
        Error over what chance explains, where that is largest; above 1 is suspicious.
    """

    name: str
    grade: Grade
    ratio: float
    error: float
    bound: float
    where: tuple[int, ...]
    value_candidate: float
    value_reference: float
    pattern: str
    reason: str
    likely: float = math.nan

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with the tensor."""
        return self.grade != "wrong"


def grade_of(ratio: float, likely: float) -> Grade:
    """Grade of a tensor, by its error over the worst case and over what chance explains."""
    if ratio > 1:
        return "wrong"
    return "suspicious" if likely > 1 else "inside rounding"


def not_given(name: str) -> Finding:
    """Finding for a tensor that the candidate lacks."""
    nan = math.nan
    reason = "not in the candidate's trace: the reference's is used, and what it may be off by is allowed from there on"
    return Finding(name, "not given", nan, nan, nan, (), nan, nan, "", reason)


def worse(one: Finding | None, other: Finding) -> Finding:
    """Finding for two parts of one tensor."""
    if one is None or math.isnan(one.ratio):
        return other
    more, less = (one, other) if one.ratio >= other.ratio else (other, one)
    likely = max(one.likely, other.likely)
    return replace(more, likely=likely, grade=grade_of(more.ratio, likely), pattern=more.pattern or less.pattern)


def first_wrong(findings: Iterable[Finding]) -> Finding | None:
    """First finding of grade "wrong"."""
    return next((finding for finding in findings if finding.grade == "wrong"), None)
