"""The logits beside a record: one safetensors file with one tensor, ``logits``, of shape (T, V)."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from refgemma.checkpoint.safetensors_file import read_safetensors
from refgemma.errors import InputError
from refgemma.numerics import Array, from_bfloat16

_DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64"}


def sidecar_of(path: Path) -> Path:
    """Place of the logits beside a record that is written."""
    return path.parent / f"{path.name.removesuffix('.jsonl')}.logits.safetensors"


def write_sidecar(rows: Sequence[Array] | Array, file: IO[bytes]) -> str:
    """Write logits as one tensor, without ever holding the rows side by side."""
    dtype = rows[0].dtype if rows[0].dtype.name in _DTYPES else np.dtype(np.float64)
    size = len(rows) * len(rows[0]) * dtype.itemsize
    entry = {"dtype": _DTYPES[dtype.name], "shape": [len(rows), len(rows[0])], "data_offsets": [0, size]}
    header = json.dumps({"logits": entry}).encode()
    header += b" " * (-len(header) % 8)  # so that the numbers are aligned
    digest = hashlib.sha256()
    little_endian = dtype.newbyteorder("<")
    for part in (len(header).to_bytes(8, "little"), header, *(row.astype(little_endian, copy=False) for row in rows)):
        data = part if isinstance(part, bytes) else np.ascontiguousarray(part).data
        file.write(data)
        digest.update(data)
    return digest.hexdigest()


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
    if tensor.dtype not in ("BF16", *_DTYPES.values()) or tensor.shape != shape:
        raise InputError(f"{sidecar} holds {tensor.dtype} of shape {tensor.shape}: expected floats of shape {shape}")
    digest = source.get("sha256")
    if digest is not None:
        with sidecar.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise InputError(f"{sidecar} is not the file that was written with it: their sha256 differ")
    return from_bfloat16(tensor.data) if tensor.dtype == "BF16" else tensor.data
