"""Safetensors files, mapped: every tensor is a read-only view of the file itself, so opening one costs no reading.

The format is the length of a header, the header, which gives each tensor's dtype, shape and place, and all numbers, one
tensor after another without gap or overlap, up to the end of the file::

    8 bytes            n, little-endian
    n bytes of JSON    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}
    the rest           data, where the offsets count from

The library's own NumPy loader copies what it reads and has no bfloat16, which Gemma files are made of, so the header is
read here, as strictly as the library reads it.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import Array

# Each stored format as NumPy sees it. It has no name for bfloat16 and float8: they appear as their bits.
_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4",
    "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip

_LONGEST_HEADER = 100_000_000  # bytes; the library's limit

# What stands under the name of a weight file when something went wrong before.
_IMPOSTORS = {
    b"version https://git-lfs": "a Git LFS pointer, whose weights were never fetched: run `git lfs pull` in its folder",
    b"GGUF": "a GGUF file: only safetensors files are read",
    b"PK\x03\x04": "a pickled PyTorch file, which is never opened because it can run code: convert it to safetensors",
    b"<": "a web page: the download was refused, perhaps for want of a login or an accepted licence",
    b"{": "a JSON file: expected the weights themselves",
}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor in its file."""

    name: str  # what the file calls it
    dtype: str  # stored format, in the words of the file: "BF16", "F16", "F32",
    # the numbers, a read-only view of the mapped file; BF16 and float8 numbers as their bits, in unsigned integers
    data: Array
    file: Path  # where it is stored

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes


def read_safetensors(path: str | Path) -> dict[str, StoredTensor]:
    """Map a safetensors file.

    The arrays keep the mapping alive and see what happens to the file: replace a file that may be in use by renaming a
    new one over it, and never write into it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file: expected a safetensors file")
    with path.open("rb") as file:
        size = path.stat().st_size
        beginning = file.read(32)
        length = _header_length(beginning, size, path)
        file.seek(8)
        places = _places(file.read(length), path)
        data_start = 8 + length
        needed = data_start + (places[-1].end if places else 0)
        if size < needed:
            raise InputError(f"{path} is cut off: {size:,} of {needed:,} bytes are there; fetch it again")
        if size > needed:
            raise InputError(
                f"{path} has {size - needed:,} bytes that belong to no tensor: it is damaged; fetch it again"
            )
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for place in places:
        flat = np.frombuffer(mapping, _DTYPES[place.dtype], math.prod(place.shape), data_start + place.begin)
        tensors[place.name] = StoredTensor(place.name, place.dtype, flat.reshape(place.shape), path)
    return tensors


def let_go(numbers: Array) -> None:
    """Give the memory of mapped numbers back to the system, once they were read.

    They can be read again as before, from the system's cache or from the file. What was given back by several threads
    no longer has to be taken down by one, when the mapping ends.
    """
    mapping: Any = numbers
    while isinstance(mapping, np.ndarray | memoryview):
        mapping = mapping.base if isinstance(mapping, np.ndarray) else mapping.obj
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        place = _address(numbers) - _address(np.frombuffer(mapping, np.uint8, 1))
        start = -(-place // mmap.PAGESIZE) * mmap.PAGESIZE
        whole_pages = (place + numbers.nbytes - start) // mmap.PAGESIZE
        if whole_pages > 0:
            with contextlib.suppress(OSError):  # a process may have its memory locked: it stays, then
                mapping.madvise(mmap.MADV_DONTNEED, start, whole_pages * mmap.PAGESIZE)


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _header_length(beginning: bytes, size: int, path: Path) -> int:
    """First number of the file, once it is plausible."""
    for sign, what in _IMPOSTORS.items():
        # A true file holds the header's opening brace after the length; none of the others does.
        if beginning.startswith(sign) and beginning[8:9] != b"{":
            raise InputError(f"{path} is {what}")
    if len(beginning) < 8:
        raise InputError(
            f"{path} is cut off: {size} bytes are there, too few for the length of the header; fetch it again"
        )
    length = int.from_bytes(beginning[:8], "little")
    if beginning[8:9] not in (b"{", b"") or not 2 <= length <= _LONGEST_HEADER:
        raise InputError(f"{path} is no safetensors file: expected the length of a header, then JSON from byte 8 on")
    if length > size - 8:
        raise InputError(
            f"{path} is cut off: {size:,} bytes are there, its header alone has {8 + length:,}; fetch it again"
        )
    return length


class _Place(NamedTuple):
    """Entry of the header: `begin` and `end` count bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _places(header: bytes, path: Path) -> list[_Place]:
    """Check the header against itself; its entries in the order of the file."""
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
    return places


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
    """Refuse a name that stands twice, where JSON readers silently differ in which one they keep."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{twice!r} stands in it twice")
    return fields


def _no_constant(word: str) -> None:
    raise InputError(f"{word} is no JSON")
