"""Where a model computes: with NumPy on the processor, or with CuPy on a GPU.

Operations take their array library from their arguments, so choosing a device means choosing where the weights are.
Numbers are copied at few places, always explicitly: weights when they are loaded, tokens and positions on entry to
`refgemma.model.forward`, and results by `refgemma.numerics.to_host`. Random numbers are drawn and tokens are chosen on
the host.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import to_host

T = TypeVar("T")

DEVICES = ("cpu", "cuda")


def array_library(device: str) -> Any:
    """Array library that computes on a device, after a trial computation.

    CuPy multiplies float32 matrices in float32, unless the environment variable ``CUPY_TF32=1`` is set: then it rounds
    the factors to 11 significant bits, and no error bound of this package holds.
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
    """Arrays, and whatever holds them, in the arrays of a library; parts that are already there are shared."""
    done: dict[int, Any] = {}  # by identity, so that a tied head stays tied

    def move(value: Any) -> Any:
        if id(value) not in done:
            done[id(value)] = moved(value)
        return done[id(value)]

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            parts = {name: move(part) for name, part in value.items()}
            return value if all(parts[name] is value[name] for name in parts) else parts
        if isinstance(value, (list, tuple)):
            items = [move(item) for item in value]
            return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
        if is_dataclass(value) and not isinstance(value, type):  # Bfloat16Matrix, Adapted, Delta
            old = {field.name: getattr(value, field.name) for field in fields(value)}
            new = {name: move(part) for name, part in old.items()}
            return value if all(new[name] is old[name] for name in old) else replace(value, **new)
        if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic):
            return to_host(value) if xp is np else xp.asarray(value)
        return value

    there: T = move(tree)
    return there
