"""The arithmetic that numbers were computed in, told from the numbers: float32 files often hold bfloat16 values.

An engine that computes in bfloat16 writes most of its tensors down in it; of one that computes in float32 hardly any
tensor has only values that bfloat16 knows.
"""

from __future__ import annotations

import numpy as np

from refgemma.numerics import PROFILES, Array
from refgemma.oracle.traces.trace import Trace

_NARROW_FIRST = ("bfloat16", "float16", "float32", "float64")
_EXAMINED = 12  # tensors
_NUMBERS = 2**20  # of each


def arithmetic_of(trace: Trace) -> tuple[str, str]:
    """Narrowest format that holds most tensors exactly."""
    if trace.meta.get("numerics") in PROFILES:
        return trace.meta["numerics"], "as its metadata says"
    stored = [trace.dtypes[name] for name in trace.tensors]
    commonest = max(_NARROW_FIRST, key=stored.count)
    names = [name for name in trace.tensors if trace.dtypes[name] == commonest]
    some = names[:: max(1, len(names) // _EXAMINED)]
    held = [narrowest(np.asarray(trace.tensors[name]).reshape(-1)[:_NUMBERS]) for name in some]
    for dtype in _NARROW_FIRST[: _NARROW_FIRST.index(commonest)]:
        if 2 * sum(_NARROW_FIRST.index(one) <= _NARROW_FIRST.index(dtype) for one in held if one) > len(some):
            return dtype, f"stored as {commonest}, but most numbers are {dtype} numbers"
    return commonest, f"stored as {commonest}"


def narrowest(numbers: Array) -> str:
    """Narrowest format that holds all of some numbers."""
    telling = numbers[np.isfinite(numbers) & (numbers != 0) & (numbers != 1)]
    if not telling.size:
        return ""
    with np.errstate(over="ignore"):
        single = telling.astype(np.float32)
    if not (single == telling).all():
        return "float64"
    if not (single.view(np.uint32) & np.uint32(0xFFFF)).any():
        return "bfloat16"
    with np.errstate(over="ignore"):
        return "float16" if (single.astype(np.float16) == single).all() else "float32"
