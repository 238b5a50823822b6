"""Number formats: which dtype activations have, where they are rounded, and how bfloat16 is widened.

A bfloat16 number is the upper half of a float32, so widening is a shift and exact; narrowing rounds to nearest, ties to
even. NumPy has no such dtype: matrices keep their stored bits as uint16 in a `Bfloat16Matrix`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from refgemma.errors import InputError
from refgemma.profiles import ENGINES, ROUNDINGS, roundings_of

Array: TypeAlias = NDArray[Any]
T = TypeVar("T", NDArray[Any], float)


def namespace_of(x: Array) -> Any:
    """Array library of `x`, as a module."""
    return np if isinstance(x, np.ndarray) else importlib.import_module(type(x).__module__.partition(".")[0])


def to_host(x: Array) -> Array:
    """NumPy array of the same numbers."""
    host: Array = x if isinstance(x, np.ndarray) else namespace_of(x).asnumpy(x)
    return host


def to_bfloat16(x: Array) -> Array:
    """Bits of the nearest bfloat16 of each number, ties to even."""
    xp = namespace_of(x)
    bits = x.astype(np.float32, copy=False).view(np.uint32)
    # Adding just under half of the last kept bit, plus that bit, carries exactly when nearest-even rounds up.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    narrow: Array = xp.where(xp.isnan(x), quiet_nan, rounded).astype(np.uint16)
    return narrow


def from_bfloat16(bits: Array, out: Array | None = None) -> Array:
    """Exact float32 values of bfloat16 bits."""
    if out is None:
        wide = bits.astype(np.uint32)
    else:
        wide = out.view(np.uint32)
        wide[...] = bits
    wide <<= np.uint32(16)
    single: Array = wide.view(np.float32)
    return single


@dataclass(frozen=True)
class Bfloat16Matrix:
    """A weight matrix that stays in bfloat16, usually in the mapped file itself."""

    bits: Array  # (O, I): Bfloat16 numbers as stored, C-contiguous

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.bits.shape

    @property
    def nbytes(self) -> int:
        """Bytes of storage: two a number."""
        return self.bits.nbytes

    def rows(self, index: Array | slice, dtype: np.dtype[Any]) -> Array:
        """Widened copy of some rows."""
        return from_bfloat16(self.bits[index]).astype(dtype, copy=False)


@dataclass(frozen=True)
class Numerics:
    """The arithmetic of activations: one dtype to compute in, and the points where values are rounded further."""

    name: str  # what users call it
    dtype: np.dtype[Any]  # format of every activation, float32 or float64
    # rounding point to the narrower format that its values are rounded to ("bfloat16" or "float32"). Empty for plain
    # float32 and float64. A rounded value stays in an array of `dtype`
    rounding: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    stepwise: frozenset[str] = field(init=False)  # operations with a rounding point inside: taken step by step

    def __post_init__(self) -> None:
        for point, narrow in self.rounding.items():
            if point not in ROUNDING_POINTS:
                raise InputError(f"{point!r} is not a rounding point: expected one of {', '.join(ROUNDING_POINTS)}")
            if narrow not in ("bfloat16", "float32"):
                raise InputError(f"rounding point {point!r} has format {narrow!r}: expected 'bfloat16' or 'float32'")
        object.__setattr__(self, "stepwise", frozenset(point.partition(".")[0] for point in self.rounding))

    def round(self, point: str, value: T) -> T:
        """Value, an array or a number of a formula, after the rounding, if any, at a named point of the computation.

        To bfloat16 by way of float32, as in the engines that are imitated: they compute in float32, then narrow.
        """
        narrow = self.rounding.get(point)
        if narrow is None:
            return value
        if isinstance(value, (int, float)):
            return float(self.round(point, np.array(value)))
        single = value.astype(np.float32, copy=False)
        if narrow == "bfloat16":
            single = from_bfloat16(to_bfloat16(single))
        return single.astype(value.dtype, copy=False)

    def without(self, *points: str) -> Numerics:
        """Same arithmetic with some rounding points switched off."""
        off = {point for pattern in points for point in _matching(pattern)}
        rounding = {point: narrow for point, narrow in self.rounding.items() if point not in off}
        return replace(self, name=f"{self.name} without {', '.join(points)}", rounding=MappingProxyType(rounding))

    def with_(self, points: str, narrow: str) -> Numerics:
        """Same arithmetic with some rounding points set to a format."""
        rounding = {**self.rounding, **dict.fromkeys(_matching(points), narrow)}
        return replace(self, name=f"{self.name} with {points} in {narrow}", rounding=MappingProxyType(rounding))


def _matching(pattern: str) -> list[str]:
    """Rounding points of that name or pattern."""
    found = [point for point in ROUNDING_POINTS if fnmatchcase(point, pattern)]
    if not found:
        raise InputError(f"{pattern!r} is not a rounding point: expected one of {', '.join(ROUNDING_POINTS)}")
    return found


# Where an engine that computes in a narrow format may round: point, what is rounded there.
ROUNDING_POINTS: dict[str, str] = {point: meaning for point, (meaning, *_) in ROUNDINGS.items()}

FLOAT64 = Numerics("float64", np.dtype(np.float64))
FLOAT32 = Numerics("float32", np.dtype(np.float32))
PROFILES: dict[str, Numerics] = {
    profile.name: profile
    for profile in (FLOAT32, FLOAT64, *(Numerics(name, np.dtype(np.float32), roundings_of(name)) for name in ENGINES))
}
