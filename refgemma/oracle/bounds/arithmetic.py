"""The arithmetic an engine claims to compute in, as far as it bounds the engine's errors.

Two things follow from it. Constants that it rounds (sqrt(D), 1 + weight, ...) are the same on every machine, so the
float64 reference takes them rounded, too, and nothing has to be allowed for them. Everything else that it rounds moves
a result by at most the unit roundoff u, half the spacing of numbers just above one: 2**-24 in float32, 2**-11 in
float16 and 2**-8 in bfloat16, whose numbers have 8 significant bits. Relative to the exact value it is u / (1 + u).

References
----------
Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, section 2.1; Jeannerod and Rump, "On
Relative Errors of Floating-Point Operations: Optimal Bounds and Applications", 2018 (u / (1 + u)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from refgemma.errors import InputError
from refgemma.model import Params
from refgemma.numerics import PROFILES, Array, Bfloat16Matrix, Numerics, from_bfloat16, to_bfloat16
from refgemma.ops.linear import Adapted, Operand

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

# Half the spacing of the smallest numbers, or, where engines flush those to zero, the largest that is flushed.
_TINY = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-25, "bfloat16": 2.0**-126}

# Rounded values that depend on the model alone and are formed in one step: the same number in every engine that rounds
# them. (The rotary table is none: the float32 angle behind it is each library's own.)
CONSTANTS = ("embed.scale", "norm.eps", "norm.gain", "attn.scale", "gelu.constant", "rope.frequency")

ALIASES = {"bfloat16": "bf16-transformers", "float16": "bf16-transformers"}


@dataclass(frozen=True)
class Arithmetic:
    """Sizes of an engine's roundings."""

    name: str  # as the user gave it
    storage: str  # format of its tensors: "float64", "float32", "float16" or "bfloat16"
    unit: float  # unit roundoff of the arithmetic inside operations, and of sums
    narrow: float  # relative error of one rounding to `storage`, at most
    # rounding points of `refgemma.profiles` at which a value that depends on the input is rounded to `storage`
    points: frozenset[str]
    reference: Numerics  # what the reference runs in: float64, constants rounded as this arithmetic rounds them
    tiny: float  # what a result may be off by although no rounding is that large: underflow

    def at(self, point: str) -> float:
        """Unit roundoff at a rounding point."""
        return self.narrow if point in self.points else 0.0


def arithmetic_of(name: str | Numerics | Arithmetic) -> Arithmetic:
    """Arithmetic of a name."""
    if isinstance(name, Arithmetic):
        return name
    if isinstance(name, Numerics):
        profile, name = name, name.name
    elif ALIASES.get(name, name) in PROFILES:
        profile = PROFILES[ALIASES.get(name, name)]
    else:
        known = ", ".join([*PROFILES, *ALIASES])
        raise InputError(f"arithmetic is {name!r}: there are {known}")
    rounded = frozenset(point for point, narrow in profile.rounding.items() if narrow == "bfloat16")
    storage = "float16" if name == "float16" else "bfloat16" if rounded else str(profile.dtype)
    # What is true of bfloat16 alone: float16 would round constants to other numbers, so it gets them as roundings.
    constants = frozenset(CONSTANTS) if storage == "bfloat16" else frozenset()
    exact = {point: "bfloat16" for point in CONSTANTS if point in rounded & constants}
    wide = str(profile.dtype)
    return Arithmetic(
        name=name,
        storage=storage,
        # Our own float64 is as inexact as theirs: twice.
        unit=UNIT[wide] * (2 if wide == "float64" else 1),
        narrow=UNIT[storage] if storage == wide else UNIT[storage] / (1 + UNIT[storage]),
        points=rounded - constants,
        reference=Numerics(f"float64 with the constants of {name}", np.dtype(np.float64), exact),
        tiny=_TINY[storage] if storage == "float16" else _TINY[wide],
    )


def confidence(size: int) -> float:
    """Standard deviations that no one of many random sums exceeds, but once in a million tensors.

    Hoeffding, "Probability Inequalities for Sums of Bounded Random Variables", 1963; as used for rounding errors by
    Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019, section 2.
    """
    return math.sqrt(2 * math.log(2 * max(size, 1) / 1e-6))


def params_in(params: Params, arithmetic: Arithmetic) -> Params:
    """Weights as an engine of that arithmetic holds them.

    Low-rank deltas stay as they are: PEFT keeps them in float32.
    """
    change = {"bfloat16": _nearest_bfloat16, "float16": _nearest_float16}.get(arithmetic.storage)
    if change is None:
        return params
    layers = [
        {part: {key: change(w) for key, w in cast(Mapping[str, Operand], weights).items()} for part, weights in items}
        for items in (cast(Mapping[str, Any], layer).items() for layer in params["layers"])
    ]
    embed = change(params["embed"])
    head = embed if params["head"] is params["embed"] else change(params["head"])
    changed = {"embed": embed, "layers": layers, "final_norm": change(params["final_norm"]), "head": head}
    return cast(Params, changed)


def _nearest_bfloat16(w: Operand) -> Operand:
    if isinstance(w, Adapted):
        return replace(w, base=cast(Array, _nearest_bfloat16(w.base)))
    if isinstance(w, Bfloat16Matrix):
        return w
    rounded = from_bfloat16(to_bfloat16(w.astype(np.float32, copy=False)))
    return w if np.array_equal(rounded, w) else rounded


def _nearest_float16(w: Operand) -> Operand:
    if isinstance(w, Adapted):
        return replace(w, base=cast(Array, _nearest_float16(w.base)))
    wide = w.rows(slice(None), np.dtype(np.float32)) if isinstance(w, Bfloat16Matrix) else w
    return wide.astype(np.float16).astype(np.float32)
