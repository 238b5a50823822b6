"""Logits of any model, from a file, checked once here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from refgemma.errors import InputError, listed
from refgemma.files.arrays import read_arrays
from refgemma.numerics import Array

EXPECTED = "a safetensors, .npz, .npy or .json file of logits"


def read_logits(path: str | Path, name: str | None = None) -> Array:
    """Read logits."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file: expected {EXPECTED}")
    return _checked(_from_json(path, name) if path.suffix == ".json" else _from_arrays(path, name), path)


def _from_arrays(path: Path, name: str | None) -> Array:
    arrays = read_arrays(path, nameless="")
    if "" in arrays and name is not None:
        raise InputError(f"{path} holds one array without a name: leave out --tensor")
    array = arrays[_pick(list(arrays), name, path)]
    if array.dtype.startswith("F8"):
        raise InputError(f"{path}: {array.name!r} is {array.dtype}, too coarse for logits: expected F16, BF16 or F32")
    return array.read()


def _checked(array: Array, path: Path) -> Array:
    """Rows of floats, once they are known to be usable."""
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2) or not array.size:
        if array.ndim > 2 and array.dtype.kind in "fiu":
            hint = "save one row of the batch"
        else:
            hint = "save the scores of every vocabulary entry as plain numbers"
        raise InputError(f"{path} holds {array.dtype} of shape {array.shape}: expected logits (V,) or (T, V); {hint}")
    wide = array.dtype.kind != "f" or array.dtype.itemsize > 8
    rows: Array = np.atleast_2d(array).astype(np.float64 if wide else array.dtype.newbyteorder("="), copy=False)
    for t, row in enumerate(rows):
        highest = row.max()
        where = f"row {t} of {path}" if len(rows) > 1 else str(path)
        if np.isnan(highest):
            raise InputError(f"{where} holds NaN, first for token {int(np.isnan(row).argmax())}: expected numbers")
        if highest == np.inf:
            raise InputError(f"{where} holds plus infinity, for token {int(row.argmax())}: expected finite numbers")
        if highest == -np.inf:
            raise InputError(f"{where} is all minus infinity: expected at least one token that can be chosen")
    return rows


def _pick(names: list[str], name: str | None, path: Path) -> str:
    """Name of the array that is meant."""
    if name is not None:
        if name in names:
            return name
        raise InputError(f"{path} has no array {name!r}: it has {_arrays(names)}")
    if len(names) == 1 or "logits" in names:
        return names[0] if len(names) == 1 else "logits"
    raise InputError(f"{path} holds {_arrays(names)}: expected one, or one called 'logits'; name it with --tensor")


def _arrays(names: list[str]) -> str:
    return f"the arrays {listed(names)}" if names else "no arrays"


def _from_json(path: Path, name: str | None) -> Array:
    wanted = "expected a list of numbers, (V,), or of such lists, (T, V)"
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): {wanted}") from None
    if isinstance(content, dict):
        content = content[_pick(list(content), name, path)]
    rows = content if isinstance(content, list) and content and isinstance(content[0], list) else [content]
    for t, row in enumerate(rows):
        where = f"row {t} of {path}" if len(rows) > 1 else str(path)
        if not isinstance(row, list) or not row:
            raise InputError(f"{where} holds {row!r:.40}: {wanted}")
        if len(row) != len(rows[0]):
            raise InputError(f"{where} has {len(row)} numbers, row 0 has {len(rows[0])}: {wanted}")
        for token, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputError(f"{where} holds {value!r:.40} for token {token}: {wanted}; -Infinity where removed")
    try:
        return np.array(rows, dtype=np.float64)
    except OverflowError:
        raise InputError(f"{path} holds a number beyond float64: {wanted}") from None
