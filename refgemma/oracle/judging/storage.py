"""Numbers that were written down more narrowly than they were computed: a float32 run saved as float16 or bfloat16.

Such a file looks like one of an engine that computes in that format, but its operations do not fit together: each was
computed from what had not been rounded yet. So many kinds of operation are off by a rounding or two, weights or none,
where an engine with a bug is off in one kind or a few.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from refgemma.numerics import Array
from refgemma.oracle.bounds.arithmetic import UNIT
from refgemma.oracle.judging.grades import Finding
from refgemma.oracle.judging.precision import narrowest
from refgemma.oracle.operations import split_name
from refgemma.oracle.traces.trace import Trace

_NUMBERS = 2**20  # looked at, of each tensor
_PRODUCTS = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down", "logits")


def lost(values: Array, dtype: str, computed: str) -> Array | float:
    """Most that storing numbers took away from them.

    Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, theorem 2.3.
    """
    unit = unit_lost(dtype, computed)
    tiny = 2.0**-25 if dtype == "float16" and dtype != computed else 0.0  # bfloat16 has far smaller numbers, too
    if not unit and not tiny:
        return 0.0
    slack: Array = unit * np.abs(values) + tiny
    return slack


def unit_lost(dtype: str, computed: str) -> float:
    """Unit roundoff of what storing took away."""
    unit = UNIT.get(dtype, 0.0)
    return unit if unit > UNIT[computed] else 0.0


def as_stored(theirs: Trace) -> Trace:
    """Trace whose formats are the narrowest that hold the numbers: a float32 file may hold nothing but bfloat16."""
    found = dict(theirs.dtypes)
    for name in theirs.tensors:
        found[name] = narrowest(np.asarray(theirs.tensors[name]).reshape(-1)[:_NUMBERS]) or found[name]
    return replace(theirs, dtypes=found)


def looks_stored(narrow: Iterable[Finding], wide: Iterable[Finding]) -> bool:
    """Whether a trace was computed in float32, and only stored in the format that its numbers have."""
    before, after = list(narrow), list(wide)
    given = {_operation(one.name) for one in before if one.grade != "not given"}
    wrong = {_operation(one.name) for one in before if one.grade == "wrong"}
    left = {_operation(one.name) for one in after if one.grade == "wrong"}
    return (
        2 * len(wrong) >= len(given)
        and bool(wrong & {*_PRODUCTS})
        and bool(wrong - {*_PRODUCTS})
        and 4 * len(left) <= len(wrong)
    )


def _operation(name: str) -> str:
    """Kind of operation: one bug is in all three norms."""
    kind = split_name(name)[1]
    return "norm" if kind.endswith("norm") else kind
