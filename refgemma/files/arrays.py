"""Files of named arrays, whichever program wrote them: safetensors, .npz and .npy, recognised by content.

Opening one reads headers; the numbers of an array are read when it is asked for.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.errors import InputError
from refgemma.files.kinds import PICKLED, kind_of
from refgemma.files.safetensors import FLOATS, StoredTensor, read_safetensors
from refgemma.numerics import Array, from_bfloat16

EXPECTED = "a safetensors, .npz or .npy file"


@dataclass(frozen=True, eq=False)
class StoredArray:
    """One array of a file."""

    name: str
    dtype: str  # NumPy's name of its format, or "bfloat16"; of float8, the file's own
    shape: tuple[int, ...]
    read: Callable[[], Array]  # gives the numbers, bfloat16 widened to float32


class LazyArrays(Mapping[str, Array]):
    """Arrays by name, each made anew whenever it is asked for, so that none stays in memory."""

    def __init__(self, makers: Mapping[str, Callable[[], Array]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Array:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers  # without making it


def read_arrays(path: str | Path, *, nameless: str = "logits") -> dict[str, StoredArray]:
    """Open a file of arrays; the one array of a .npy file is called `nameless`."""
    path = Path(path)
    kind = kind_of(path, EXPECTED)
    if kind == "safetensors":
        return {name: _from_safetensors(tensor) for name, tensor in read_safetensors(path).items()}
    if kind == "npy":
        with _sentences(path):
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        return {nameless: StoredArray(nameless, _name(mapped.dtype), mapped.shape, lambda: _plain(mapped))}
    with _sentences(path), zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        arrays = {name.removesuffix(".npy"): _from_npz(path, archive, name) for name in members}
    if not arrays:
        raise InputError(f"{path} is a zip archive without arrays: expected {EXPECTED}")
    return arrays


def _from_safetensors(tensor: StoredTensor) -> StoredArray:
    dtype = tensor.dtype if tensor.dtype.startswith("F8") else FLOATS.get(tensor.dtype, tensor.data.dtype.name)
    return StoredArray(tensor.name, dtype, tensor.shape, lambda: _plain(tensor.numbers()))


def _from_npz(path: Path, archive: zipfile.ZipFile, member: str) -> StoredArray:
    """Array of an archive, by its header alone."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
    if dtype.hasobject:
        raise ValueError("Python objects")

    def read() -> Array:
        with _sentences(path), np.load(path, allow_pickle=False) as arrays:
            return _plain(arrays[member.removesuffix(".npy")])

    return StoredArray(member.removesuffix(".npy"), _name(dtype), shape, read)


def _name(dtype: np.dtype[Any]) -> str:
    """Name of a format; NumPy saves a bfloat16 array of JAX or ml_dtypes as two bytes of no kind."""
    return "bfloat16" if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None else dtype.name


def _plain(array: Array) -> Array:
    """Numbers in this machine's order of bytes; bfloat16 widened."""
    if _name(array.dtype) == "bfloat16":
        return from_bfloat16(np.ascontiguousarray(array).view("<u2"))
    return np.asarray(array).astype(array.dtype.newbyteorder("="), copy=False)


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Turn NumPy's errors about a file into one sentence."""
    try:
        yield
    except MemoryError as error:
        raise InputError(f"{path} has more numbers than fit into memory ({error})") from None
    except Exception as error:  # a damaged header goes through Python's tokenizer and parser, zip and zlib: any kind
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise InputError(f"{path} holds objects that are {PICKLED}: save plain numbers") from None
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path} is damaged ({reason}): save it again with numpy.save or numpy.savez") from None
