"""The arithmetic an engine claims to compute in, as far as it bounds the engine's errors.

Two things follow from it. Constants that it rounds (sqrt(D), 1 + weight, ...) are the same on every machine, so the
float64 reference rounds them as well, and nothing has to be allowed for them. Everything else that it rounds moves a
result by at most the unit roundoff u, half the spacing of numbers just above one: 2**-24 in float32, 2**-11 in float16
and 2**-8 in bfloat16, whose numbers have 8 significant bits. Relative to the exact value it is u / (1 + u).

References
----------
Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, section 2.1; Jeannerod and Rump, "On
Relative Errors of Floating-Point Operations: Optimal Bounds and Applications", 2018 (u / (1 + u)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import PROFILES, Array, Bfloat16Matrix, Numerics, from_bfloat16, to_bfloat16
from refgemma.ops.linear import Adapted, Operand
from refgemma.oracle.thresholds import STRAY
from refgemma.params import Params, changed, each_once

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

# Half the spacing of the smallest numbers, or, where engines flush those to zero, the largest that is flushed.
_TINY = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-25, "bfloat16": 2.0**-126}

# Rounded values that depend on the model alone and are formed in one step: the same number in every engine that rounds
# them. (The rotary table is not: the float32 angle behind it is each library's own.)
CONSTANTS = ("embed.scale", "norm.eps", "norm.gain", "attn.scale", "gelu.constant", "rope.frequency")

ALIASES = {"bfloat16": "bf16-transformers", "float16": "bf16-transformers"}


@dataclass(frozen=True)
class Arithmetic:
    """Sizes of an engine's roundings."""

    name: str  # as the user gave it
    storage: str  # format of its tensors: "float64", "float32", "float16" or "bfloat16"
    unit: float  # unit roundoff of the arithmetic inside operations, and of sums
    narrow: float  # relative error of one rounding to `storage`, at most
    points: frozenset[str]  # rounding points at which a value that depends on the input is rounded to `storage`
    reference: Numerics  # what the reference runs in: float64, constants rounded as this arithmetic rounds them
    tiny: float  # what a result may be off by although no rounding is that large: underflow

    def at(self, point: str) -> float:
        """Unit roundoff at a rounding point."""
        return self.narrow if point in self.points else 0.0

    def words(self, *points: str) -> str:
        """What an operation computes in, and what it rounds to at any of these points or those below them."""
        wide = f"{'float32' if self.unit == UNIT['float32'] else 'float64'} ({self.unit:.1e} each)"
        if not any(p == point or p.startswith(point + ".") for p in self.points for point in points):
            return wide
        return f"{wide}, rounded to {self.storage} ({self.narrow:.1e})"


def arithmetic_of(name: str | Numerics | Arithmetic) -> Arithmetic:
    """Arithmetic of a name."""
    if isinstance(name, Arithmetic):
        return name
    if isinstance(name, Numerics):
        profile, name = name, name.name
    elif ALIASES.get(name, name) in PROFILES:
        profile = PROFILES[ALIASES.get(name, name)]
    else:
        raise InputError(f"unknown arithmetic {name!r}: expected one of {', '.join([*PROFILES, *ALIASES])}")
    rounded = frozenset(point for point, narrow in profile.rounding.items() if narrow == "bfloat16")
    storage = "float16" if name == "float16" else "bfloat16" if rounded else str(profile.dtype)
    # The profiles' constants are bfloat16's alone: float16 rounds them to other numbers, so there they are roundings.
    constants = frozenset(CONSTANTS) if storage == "bfloat16" else frozenset()
    wide = str(profile.dtype)
    return Arithmetic(
        name=name,
        storage=storage,
        unit=UNIT[wide] * (2 if wide == "float64" else 1),  # the reference's own float64 is as inexact: twice
        narrow=UNIT[storage] if storage == wide else UNIT[storage] / (1 + UNIT[storage]),
        points=rounded - constants,
        reference=Numerics(
            f"float64 with the constants of {name}",
            np.dtype(np.float64),
            {point: "bfloat16" for point in CONSTANTS if point in rounded & constants},
        ),
        tiny=_TINY[storage] if storage == "float16" else _TINY[wide],
    )


def confidence(size: int) -> float:
    """Standard deviations that none of `size` random sums exceeds, but with probability `STRAY`.

    Hoeffding, "Probability Inequalities for Sums of Bounded Random Variables", 1963; as used for rounding errors by
    Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019, section 2.
    """
    return math.sqrt(2 * math.log(2 * max(size, 1) / STRAY))


def storage_unit(dtype: str, computed: str) -> float:
    """Unit roundoff of storing numbers that were computed in another format; 0 if that one was not wider."""
    unit = UNIT.get(dtype, 0.0)
    return unit if unit > UNIT[computed] else 0.0


def storage_slack(values: Array, dtype: str, computed: str) -> Array | float:
    """Most that storing took from numbers that were computed in another format (Higham, 2002, theorem 2.3)."""
    unit = storage_unit(dtype, computed)
    tiny = _TINY["float16"] if dtype == "float16" and dtype != computed else 0.0  # bfloat16 has far smaller numbers
    return unit * np.abs(values) + tiny if unit or tiny else 0.0


def params_in(params: Params, arithmetic: Arithmetic) -> Params:
    """Weights as an engine of that arithmetic holds them; low-rank deltas stay float32, as PEFT keeps them."""
    storage = arithmetic.storage
    if storage not in ("bfloat16", "float16"):
        return params
    return changed(params, each_once(lambda w: _held(w, storage)))


def _held(w: Operand, storage: str) -> Operand:
    """A weight rounded to a narrow format; itself where it already is."""
    if isinstance(w, Adapted):
        return replace(w, base=cast(Array, _held(w.base, storage)))
    if isinstance(w, Bfloat16Matrix):
        if storage == "bfloat16":
            return w
        w = w.rows(slice(None), np.dtype(np.float32))
    narrow = to_bfloat16(w.astype(np.float32, copy=False)) if storage == "bfloat16" else w.astype(np.float16)
    rounded = from_bfloat16(narrow) if storage == "bfloat16" else narrow.astype(np.float32)
    return w if np.array_equal(rounded, w) else rounded
