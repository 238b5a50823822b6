"""Where a model computes: with NumPy on the processor, or with CuPy on a GPU.

Operations take their array library from the arrays that come in, so choosing a device is choosing where the weights
lie. Numbers cross over at few places, always on purpose: weights when they are loaded, tokens and positions at the door
of `refgemma.model.forward`, and what is asked back with `refgemma.numerics.to_host`. Random numbers are drawn, and
tokens are chosen, on the host.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import Array, to_host

T = TypeVar("T")

DEVICES = ("cpu", "cuda")


def array_library(device: str) -> Any:
    """Array library that computes on a device, once it has shown that it can.

    CuPy multiplies float32 matrices in float32, unless the environment says ``CUPY_TF32=1``: then it rounds what it
    multiplies to 11 significant bits, and no error bound of this package holds.
    """
    if device not in DEVICES:
        raise InputError(f"device is {device!r}: expected {' or '.join(map(repr, DEVICES))}")
    if device == "cpu":
        return np
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError:
        raise InputError(
            "device 'cuda' computes with CuPy, which is not installed: pip install \"refgemma[gpu]\", or use 'cpu'"
        ) from None
    except ImportError as error:
        raise InputError(f"device 'cuda' computes with CuPy, which does not load: {_line(error)}") from None
    try:
        one = cupy.ones((1, 1), np.float32)
        (one @ one + one).item()  # takes a driver, a GPU, the library of products and the compiler of kernels
    except (RuntimeError, ImportError, OSError) as error:
        raise InputError(f"device 'cuda' was asked for, and CuPy finds none to compute on: {_line(error)}") from None
    return cupy


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def placed(tree: T, xp: Any) -> T:
    """Weights in the arrays of a library."""
    moved: dict[int, Any] = {}

    def move(value: Any) -> Any:
        if id(value) not in moved:
            moved[id(value)] = _moved(value, xp, move)
        return moved[id(value)]

    there: T = move(tree)
    return there


def _moved(value: Any, xp: Any, move: Any) -> Any:
    if isinstance(value, Mapping):
        changed = _changed(value, move)
        return {**value, **changed} if changed else value
    if isinstance(value, (list, tuple)):
        changed = _changed(dict(enumerate(value)), move)
        return type(value)(changed.get(i, item) for i, item in enumerate(value)) if changed else value
    if is_dataclass(value) and not isinstance(value, type):  # Bfloat16Matrix, Adapted, Delta
        changed = _changed({field.name: getattr(value, field.name) for field in fields(value)}, move)
        return replace(value, **changed) if changed else value
    if hasattr(value, "dtype") and not isinstance(value, np.generic):
        there: Array = to_host(value) if xp is np else xp.asarray(value)
        return there
    return value


def _changed(parts: Mapping[Any, Any], move: Any) -> dict[Any, Any]:
    """Those parts that were elsewhere, moved."""
    moved = {name: move(part) for name, part in parts.items()}
    return {name: there for name, there in moved.items() if there is not parts[name]}
