"""Number formats: which dtype activations have, where they are rounded, and how bfloat16 is widened.

A bfloat16 number is the upper half of a float32, so widening is a shift and exact; narrowing rounds to nearest, ties to
even. NumPy has no such dtype: matrices keep their stored bits as uint16 in a `Bfloat16Matrix`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


def namespace_of(x: Array) -> Any:
    """Array library of `x`, as a module.

    Parameters
    ----------
    x : ndarray
        A NumPy or CuPy array.

    Returns
    -------
    module
        ``numpy`` or ``cupy``.
    """
    return np if isinstance(x, np.ndarray) else importlib.import_module(type(x).__module__.partition(".")[0])


def to_bfloat16(x: Array) -> Array:
    """Bits of the nearest bfloat16 of each number, ties to even.

    Parameters
    ----------
    x : ndarray of float32, any shape
        Numbers to narrow. NaN stays NaN, and what is too large becomes infinite.

    Returns
    -------
    ndarray of uint16, same shape
        Sign, 8 exponent bits, 7 mantissa bits.
    """
    xp = namespace_of(x)
    bits = x.astype(np.float32, copy=False).view(np.uint32)
    # Adding just under half of the last kept bit, plus that bit, carries exactly when nearest-even rounds up.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    narrow: Array = xp.where(xp.isnan(x), quiet_nan, rounded).astype(np.uint16)
    return narrow


def from_bfloat16(bits: Array) -> Array:
    """Exact float32 values of bfloat16 bits.

    Parameters
    ----------
    bits : ndarray of uint16, any shape
        Bfloat16 numbers as stored.

    Returns
    -------
    ndarray of float32, same shape
        The same numbers.
    """
    wide: Array = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide


@dataclass(frozen=True)
class Bfloat16Matrix:
    """A weight matrix that stays in bfloat16, usually in the mapped file itself.

    Attributes
    ----------
    bits : ndarray of uint16, shape (O, I)
        Bfloat16 numbers as stored, C-contiguous.
    """

    bits: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.bits.shape

    @property
    def nbytes(self) -> int:
        """Bytes of storage: two a number."""
        return self.bits.nbytes

    def rows(self, index: Array | slice, dtype: np.dtype[Any]) -> Array:
        """Widened copy of some rows.

        Parameters
        ----------
        index : slice or ndarray of int, any shape
            Which rows.
        dtype : numpy.dtype
            Format of the copy, float32 or float64.

        Returns
        -------
        ndarray of `dtype`, shape (*index.shape, I)
            The same numbers, exactly.
        """
        return from_bfloat16(self.bits[index]).astype(dtype, copy=False)


@dataclass(frozen=True)
class Numerics:
    """The arithmetic of activations: one dtype to compute in, and the points where values are rounded further.

    Attributes
    ----------
    name : str
        What users call it.
    dtype : numpy.dtype
        Format of every activation, float32 or float64.
    rounding : mapping of str to str
        Rounding point to the narrower format that its values are rounded to ("bfloat16" or "float32"). Empty for plain
        float32 and float64. A rounded value stays in an array of `dtype`.
    """

    name: str
    dtype: np.dtype[Any]
    rounding: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for point, narrow in self.rounding.items():
            if point not in ROUNDING_POINTS:
                raise ValueError(f"{point!r} is no rounding point: there are {', '.join(ROUNDING_POINTS)}")
            if narrow not in ("bfloat16", "float32"):
                raise ValueError(f"rounding point {point!r} has format {narrow!r}: expected 'bfloat16' or 'float32'")

    def scalar(self, value: float) -> Array:
        """Number as an array of no axes, in the dtype of activations.

        Parameters
        ----------
        value : float
            Any number.

        Returns
        -------
        ndarray, shape ()
            The nearest number of that dtype.
        """
        return np.array(value, dtype=self.dtype)

    def round(self, point: str, value: Array) -> Array:
        """Value as it is after the rounding, if any, at a named point of the computation.

        Parameters
        ----------
        point : str
            A key of `ROUNDING_POINTS`.
        value : ndarray, any shape
            What was just computed.

        Returns
        -------
        ndarray, same shape and dtype
            `value` itself where nothing is rounded.

        Notes
        -----
        To bfloat16 by way of float32, as in the engines that are imitated: they compute in float32, then narrow.
        """
        narrow = self.rounding.get(point)
        if narrow is None:
            return value
        if narrow == "bfloat16":
            return from_bfloat16(to_bfloat16(value.astype(np.float32))).astype(value.dtype)
        return value.astype(np.float32).astype(value.dtype)


# Where an engine that computes in a narrow format rounds. Each point is passed once by every value it names.
ROUNDING_POINTS: dict[str, str] = {
    "embed.scale": "sqrt(D), before it multiplies the table row",
    "embed": "the scaled embedding",
    "norm.gain": "1 + weight, before it multiplies",
    "norm.normed": "x / rms, before the gain",
    "norm.out": "the output of every norm",
    "linear": "the output of every matrix product with a weight",
    "rope.frequency": "theta ** (-2 i / H)",
    "rope.angle": "position times frequency",
    "rope.table": "cosines and sines",
    "rope.product": "each product of a half head with the table",
    "rope.out": "their sum",
    "attn.query": "the scaled query",
    "attn.scores": "query times key",
    "attn.probs": "the softmax",
    "attn.mix": "probabilities times values",
    "attn.residual": "the residual stream after attention",
    "mlp.act": "gelu(gate)",
    "mlp.gated": "gelu(gate) * up",
    "out": "the residual stream after the MLP",
}

FLOAT64 = Numerics("float64", np.dtype(np.float64))
FLOAT32 = Numerics("float32", np.dtype(np.float32))
PROFILES: dict[str, Numerics] = {profile.name: profile for profile in (FLOAT32, FLOAT64)}
