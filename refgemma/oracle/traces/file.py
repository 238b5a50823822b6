"""The file of a trace: safetensors, whose header is written before the first number is known.

Shapes follow from the model and the tokens, so every tensor has its place at once and is filled while the model runs.
The metadata holds "format", "version", "config" (JSON), and what else is known of the run.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from refgemma.numerics import Array, to_bfloat16

FORMAT = "refgemma-trace"
VERSION = "1"

# Our word for a format: that of the file, and bytes a number.
_STORED = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4), "float64": ("F64", 8)}
_WHOLE = ("I64", 8)  # tokens and positions


class TraceFile:
    """A file of tensors that is filled block by block, and appears at its place whole or not at all."""

    def __init__(
        self,
        path: str | Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, str],
        tokens: Array,
        positions: Array,
        meta: Mapping[str, str],
    ) -> None:
        self._path = Path(path).resolve()  # a link stays, what it points to is replaced
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        self._dtypes = dtypes
        whole = {"tokens": tokens, "positions": positions}
        stored = {name: (array.shape, *_WHOLE) for name, array in whole.items()}
        stored |= {name: (shape, *_STORED[dtypes[name]]) for name, shape in shapes.items()}
        # The widest numbers first, so that each tensor begins where a processor reads such numbers at once.
        stored = dict(sorted(stored.items(), key=lambda item: -item[1][2]))
        entries: dict[str, object] = {"__metadata__": dict(meta)}
        begins, end = {}, 0
        for name, (shape, word, size) in stored.items():
            begins[name], end = end, end + math.prod(shape) * size
            entries[name] = {"dtype": word, "shape": list(shape), "data_offsets": [begins[name], end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = struct.pack("<Q", len(text)) + text
        self._begins = {name: begin + len(self._head) for name, begin in begins.items()}
        self._size = end + len(self._head)
        self._whole = whole

    def __enter__(self) -> TraceFile:
        try:
            if self._path.is_file():
                self._path.open("ab").close()  # renaming would replace even a file that is write-protected
            elif self._path.exists():
                raise OSError(f"cannot write {self._path}: is no plain file")
            self._file: IO[bytes] = self._temporary.open("wb")
        except OSError as error:
            raise OSError(f"cannot write {self._path}: {error.strerror}" if error.strerror else str(error)) from None
        self._file.write(self._head)
        self._file.truncate(self._size)  # what is not written later is 0
        for name, array in self._whole.items():
            self._write(name, 0, array.astype("<i8"))
        return self

    def write(self, name: str, start: int, block: Array) -> None:
        """Put numbers at their place."""
        dtype = self._dtypes[name]
        narrow = to_bfloat16(np.asarray(block)) if dtype == "bfloat16" else block.astype(dtype, copy=False)
        self._write(name, start, narrow.astype(narrow.dtype.newbyteorder("<"), copy=False))

    def _write(self, name: str, start: int, block: Array) -> None:
        self._file.seek(self._begins[name] + start * block.itemsize)
        self._file.write(np.ascontiguousarray(block).data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


def save_trace(
    path: str | Path,
    tensors: Mapping[str, Array],
    dtypes: Mapping[str, str],
    tokens: Array,
    positions: Array,
    meta: Mapping[str, str],
) -> None:
    """Write tensors that are known already, one at a time. tokens, positions (B, T)."""
    shapes = {name: tensors[name].shape for name in tensors}
    with TraceFile(path, shapes, dtypes, tokens, positions, meta) as file:
        for name in tensors:
            file.write(name, 0, tensors[name])


def is_ours(path: str | Path) -> bool:
    """Whether a file says that it is a trace of ours."""
    try:
        return Path(path).suffix == ".safetensors" and read_metadata(path).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, struct.error, MemoryError, OverflowError):
        return False


def read_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of a safetensors file whose header has been checked."""
    with Path(path).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        meta: dict[str, str] = json.loads(file.read(length)).get("__metadata__", {})
    return meta
