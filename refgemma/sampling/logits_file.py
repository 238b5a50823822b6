"""Logits of any model, from a file: checked once here, so that what follows may take them as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.checkpoint.safetensors_file import read_safetensors
from refgemma.errors import InputError
from refgemma.numerics import Array, from_bfloat16

ENDINGS = (".npy", ".npz", ".safetensors", ".json")

# How files begin: one that NumPy would have to unpickle, and NumPy's own two.
_PICKLE, _NPY, _ZIP = b"\x80", b"\x93NUMPY", b"PK\x03\x04"
_WRITERS = {".npy": "numpy.save", ".npz": "numpy.savez"}
_UNOPENED = "which are never opened because they can run code: save plain numbers"


def read_logits(path: str | Path, name: str | None = None) -> Array:
    """Read logits."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise InputError(f"{path} ends in {path.suffix or 'nothing'!r}: expected logits in {', '.join(ENDINGS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file: expected logits in {', '.join(ENDINGS)}")
    if path.suffix == ".json":
        array = _from_json(path, name)
    elif path.suffix == ".safetensors":
        array = _from_safetensors(path, name)
    else:
        array = _from_numpy(path, name)
    return _checked(array, path)


def _checked(array: Array, path: Path) -> Array:
    """Rows of floats, or a sentence on what is wrong."""
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
        raise InputError(f"{path} has no array {name!r}: it has {_listed(names)}")
    if len(names) == 1 or "logits" in names:
        return names[0] if len(names) == 1 else "logits"
    raise InputError(f"{path} holds {_listed(names)}: expected one, or one called 'logits'; name it with --tensor")


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"the arrays {shown}" if names else "no arrays"


def _from_safetensors(path: Path, name: str | None) -> Array:
    tensors = read_safetensors(path)
    tensor = tensors[_pick(list(tensors), name, path)]
    if tensor.dtype == "BF16":
        return from_bfloat16(tensor.data)
    if tensor.dtype.startswith("F8"):
        raise InputError(f"{path}: {tensor.name!r} is {tensor.dtype}, too coarse for logits: expected F16, BF16 or F32")
    return tensor.data


def _from_numpy(path: Path, name: str | None) -> Array:
    with path.open("rb") as file:
        beginning = file.read(8)
        if beginning.startswith(_PICKLE):
            raise InputError(f"{path} holds pickled objects, {_UNOPENED}")
        if not beginning.startswith(_NPY if path.suffix == ".npy" else _ZIP):
            raise InputError(f"{path} is no {path.suffix} file: expected one that {_WRITERS[path.suffix]} wrote")
        file.seek(0)
        with _sentences(path):
            loaded: Any = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if name is not None:
                raise InputError(f"{path} holds one array without a name: leave out --tensor")
            return loaded
        key = _pick(loaded.files, name, path)
        with _sentences(path):
            picked = loaded[key]
    if not isinstance(picked, np.ndarray):  # a member of the archive that is no array, as in PyTorch's own format
        raise InputError(f"{path} is no .npz file: expected one that numpy.savez wrote")
    return picked


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Turn what NumPy says of a file that it cannot read into a sentence."""
    wanted = f"expected what {_WRITERS[path.suffix]} writes; save it again"
    try:
        yield
    except MemoryError as error:
        raise InputError(f"{path} promises more numbers than fit into memory ({error}): {wanted}, with fewer") from None
    except Exception as error:  # a damaged header goes through Python's tokenizer and parser, zip and zlib: any kind
        if "allow_pickle" in str(error):
            raise InputError(f"{path} holds pickled objects, {_UNOPENED}") from None
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path} is damaged or of another kind ({reason}): {wanted}") from None


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
