"""Safetensors files: read by mapping, so that opening one costs no reading, and written as a stream.

The format is the length of a header, the header, which gives each tensor's dtype, shape and place, and all numbers, one
tensor after another without gap or overlap, up to the end of the file::

    8 bytes            n, little-endian
    n bytes of JSON    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}
    the rest           data, where the offsets count from

The library's own NumPy loader copies what it reads and has no bfloat16, which Gemma files are made of, and its writer
wants all tensors in memory. The header is checked here as strictly as the library does.

References
----------
https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from refgemma.errors import InputError
from refgemma.files.kinds import kind_of
from refgemma.numerics import Array, Bfloat16Matrix, from_bfloat16

# Each stored format as NumPy sees it. It has no name for bfloat16 and float8: they appear as their bits.
_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4",
    "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
FLOATS = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}  # the file's word: NumPy's
CODES = {name: code for code, name in FLOATS.items()} | {"int64": "I64"}

_LONGEST_HEADER = 100_000_000  # bytes; the library's limit


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor in its file."""

    name: str
    dtype: str  # as the file writes it: "BF16", "F16", "F32", ...
    data: Array  # read-only view of the mapped file; BF16 and float8 numbers as their bits, in unsigned integers
    file: Path

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes

    def numbers(self) -> Array:
        """The numbers themselves: bfloat16 widened to float32, everything else still in the file."""
        return from_bfloat16(self.data) if self.dtype == "BF16" else self.data

    def matrix(self) -> Array | Bfloat16Matrix:
        """The mapped matrix; a copy only if its numbers are not aligned in the file."""
        data = np.require(self.data, requirements="A")
        data.flags.writeable = False
        return Bfloat16Matrix(data) if self.dtype == "BF16" else data


def read_safetensors(path: str | Path, *, longest_header: int = _LONGEST_HEADER) -> dict[str, StoredTensor]:
    """Map a safetensors file.

    The arrays keep the mapping alive and see what happens to the file: replace a file that may be in use by renaming a
    new one over it, and never write into it.
    """
    path = Path(path)
    places, _, data_start = _read_header(path, longest_header)
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for place in places:
        flat = np.frombuffer(mapping, _DTYPES[place.dtype], math.prod(place.shape), data_start + place.begin)
        tensors[place.name] = StoredTensor(place.name, place.dtype, flat.reshape(place.shape), path)
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """Texts that the writer put into the header, by name."""
    return _read_header(Path(path), _LONGEST_HEADER)[1]


class SafetensorsWriter:
    """Writes a safetensors file block by block, in any order: the header is known before the first number.

    Parameters
    ----------
    file : binary file
        Empty, and seekable.
    tensors : mapping of str to (str, tuple of int)
        Format, such as "bfloat16" or "int64", and shape of each tensor.
    metadata : mapping of str to str
        Texts for the header.
    """

    def __init__(
        self, file: IO[bytes], tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self._file = file
        self._begins: dict[str, int] = {}
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        # The widest numbers first, so that every tensor is aligned.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -_itemsize(item[1][0])):
            self._begins[name], end = end, end + math.prod(shape) * _itemsize(dtype)
            entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [self._begins[name], end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._data_start = file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(self._data_start + end)  # what is never written is 0

    def write(self, name: str, start: int, block: Array) -> None:
        """Put numbers into a tensor, from its number `start` on, in its dtype; bfloat16 as bits."""
        self._file.seek(self._data_start + self._begins[name] + start * block.itemsize)
        self._file.write(np.ascontiguousarray(block, block.dtype.newbyteorder("<")).data)


def _itemsize(dtype: str) -> int:
    return np.dtype(_DTYPES[CODES[dtype]]).itemsize


def release_memory(numbers: Array) -> None:
    """Give the memory of mapped numbers back to the system, once they were read.

    They can be read again as before, from the system's cache or from the file. Threads that do this for their own part
    spare the end of the mapping from doing it alone.
    """
    mapping: Any = numbers
    while isinstance(mapping, np.ndarray | memoryview):
        mapping = mapping.base if isinstance(mapping, np.ndarray) else mapping.obj
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        place = _address(numbers) - _address(np.frombuffer(mapping, np.uint8, 1))
        start = -(-place // mmap.PAGESIZE) * mmap.PAGESIZE
        whole_pages = (place + numbers.nbytes - start) // mmap.PAGESIZE
        if whole_pages > 0:
            with contextlib.suppress(OSError):  # a process may have locked its memory: it then stays
                mapping.madvise(mmap.MADV_DONTNEED, start, whole_pages * mmap.PAGESIZE)


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


class _Place(NamedTuple):
    """Entry of the header: `begin` and `end` count bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _read_header(path: Path, longest: int) -> tuple[list[_Place], dict[str, str], int]:
    """Entries in the order of the file, metadata, and where the data starts; all checked."""
    if kind_of(path, "a safetensors file") != "safetensors":
        raise InputError(
            f"{path} is a NumPy file or a zip archive, as pickled PyTorch files are: expected a safetensors file"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if size < 8:
            raise InputError(f"{path} is cut off: its {size} bytes are too few for a header; fetch it again")
        length = int.from_bytes(first, "little")
        if not 2 <= length <= _LONGEST_HEADER:
            raise InputError(f"{path} is not a safetensors file: its header cannot have {length:,} bytes")
        if 8 + length > size:
            raise InputError(
                f"{path} is cut off: it has {size:,} bytes, its header alone {8 + length:,}; fetch it again"
            )
        if length > longest:
            raise InputError(f"{path} has a header of {length:,} bytes: expected at most {longest:,}")
        places, metadata = _parsed(file.read(length), path)
    needed = 8 + length + (places[-1].end if places else 0)
    if size < needed:
        raise InputError(f"{path} is cut off: it has {size:,} of {needed:,} bytes; fetch it again")
    if size > needed:
        raise InputError(f"{path} is damaged: {size - needed:,} bytes belong to no tensor; fetch it again")
    return places, metadata, 8 + length


def _parsed(header: bytes, path: Path) -> tuple[list[_Place], dict[str, str]]:
    """Check the header against itself."""
    try:
        fields = json.loads(header.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
        if not isinstance(fields, dict):
            raise InputError(f"expected a JSON object, found {reprlib.repr(fields)}")
        metadata = fields.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise InputError(f"__metadata__ is {reprlib.repr(metadata)}: expected an object of strings")
        places = sorted((_place(*item) for item in fields.items()), key=lambda place: (place.begin, place.end))
        position = 0
        for place in places:
            if place.begin != position:
                how = "overlaps the tensor before it" if place.begin < position else "leaves a gap"
                raise InputError(
                    f"{place.name!r} {how}: it begins at byte {place.begin} of the data, expected {position}"
                )
            position = place.end
    except (ValueError, RecursionError) as error:  # includes what json and decode raise
        raise InputError(f"{path} has a damaged header: {error}") from None
    return places, metadata


def _place(name: str, entry: Any) -> _Place:
    """Check one entry of the header against itself."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise InputError(f"{name!r} is described by {reprlib.repr(entry)}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InputError(f"{name!r} has dtype {reprlib.repr(dtype)}: expected one of {', '.join(_DTYPES)}")
    itemsize = np.dtype(_DTYPES[dtype]).itemsize
    # NumPy's limits: 64 axes, and sizes that count in 63 bits even where another axis is empty.
    if not _whole_numbers(shape) or len(shape) > 64 or math.prod(n or 1 for n in shape) * itemsize >= 2**63:
        raise InputError(f"{name!r} has shape {reprlib.repr(shape)}: expected a list of sizes that memory can hold")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise InputError(f"{name!r} has data_offsets {reprlib.repr(offsets)}: expected where it begins and ends")
    begin, end = offsets
    needed = math.prod(shape) * itemsize
    if end - begin != needed:
        raise InputError(
            f"{name!r} has {dtype} of shape {tuple(shape)}, {needed} bytes, but lies from byte {begin} to {end}"
        )
    return _Place(name, dtype, tuple(shape), begin, end)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a repeated name: JSON readers silently differ in which of the two they keep."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return fields


def _no_constant(word: str) -> None:
    raise InputError(f"{word} is not valid JSON")
