"""The logits beside a record: one safetensors file with one tensor, ``logits``, of shape (T, V)."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from refgemma.errors import InputError
from refgemma.files.safetensors import FLOATS, SafetensorsWriter, read_safetensors
from refgemma.numerics import Array


def sidecar_of(path: Path) -> Path:
    """Place of the logits beside a record that is written."""
    return path.parent / f"{path.name.removesuffix('.jsonl')}.logits.safetensors"


def write_sidecar(rows: Sequence[Array] | Array, file: IO[bytes]) -> str:
    """Write logits as one tensor, row by row; returns the sha256 of the file."""
    V = len(rows[0])
    dtype = rows[0].dtype.name if rows[0].dtype.name in FLOATS.values() else "float64"
    writer = SafetensorsWriter(file, {"logits": (dtype, (len(rows), V))}, {})
    for t, row in enumerate(rows):
        writer.write("logits", t * V, row.astype(dtype, copy=False))
    file.flush()
    return _sha256(Path(file.name))


def read_sidecar(path: Path, source: Any, shape: tuple[int, int]) -> Array:
    """Logits beside a record, once they are the right ones."""
    name = source.get("file") if isinstance(source, dict) else None
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise InputError(f"logits is {reprlib.repr(source)}: expected the name of a file beside it")
    sidecar = path.with_name(name)
    if not sidecar.is_file():
        raise FileNotFoundError(f"{sidecar} is missing: it belongs to {path} and holds its logits")
    tensor = read_safetensors(sidecar).get("logits")
    if tensor is None:
        raise InputError(f"{sidecar} holds no tensor called logits")
    if tensor.dtype not in FLOATS or tensor.shape != shape:
        raise InputError(f"{sidecar} holds {tensor.dtype} of shape {tensor.shape}: expected floats of shape {shape}")
    if source.get("sha256") is not None and source["sha256"] != _sha256(sidecar):
        raise InputError(f"{sidecar} is not the file that was written with it: their sha256 differ")
    return tensor.numbers()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
