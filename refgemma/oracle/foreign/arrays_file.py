"""Files of named arrays, whoever wrote them: safetensors, .npz and .npy, each array read when it is asked for."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.checkpoint.safetensors_file import StoredTensor, read_safetensors
from refgemma.errors import InputError
from refgemma.numerics import Array, from_bfloat16

ENDINGS = (".safetensors", ".npz", ".npy")

# Formats whose numbers are taken, in the words of safetensors; others keep their own name, so that it can be said.
_WORDS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "BOOL": "bool"}
_WORDS |= {f"{kind}{bits}": f"{word}{bits}" for kind, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)}

# How files begin that are something else, and NumPy's own two.
_PICKLE, _NPY, _ZIP = b"\x80", b"\x93NUMPY", b"PK\x03\x04"
_WRITERS = {".npy": "numpy.save", ".npz": "numpy.savez"}


@dataclass(frozen=True, eq=False)
class StoredArray:
    """One array of a file."""

    name: str  # what the file calls it
    dtype: str  # format of its numbers: "float32", "bfloat16", "int64",
    shape: tuple[int, ...]  # sizes of its axes
    read: Callable[[], Array]  # ``read()`` gives the numbers; bfloat16 widened to float32


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


def read_arrays(path: str | Path) -> dict[str, StoredArray]:
    """Open a file of arrays."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        ending = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
        raise InputError(f"{path} {ending}: expected tensors in {', '.join(ENDINGS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file: expected tensors in {', '.join(ENDINGS)}")
    if path.suffix == ".safetensors":
        return {name: _from_safetensors(tensor) for name, tensor in read_safetensors(path).items()}
    with path.open("rb") as file:
        beginning = file.read(8)
    if beginning.startswith(_PICKLE):
        raise InputError(f"{path} holds pickled objects, which are never opened: save plain numbers")
    if not beginning.startswith(_NPY if path.suffix == ".npy" else _ZIP):
        raise InputError(f"{path} is no {path.suffix} file: expected one that {_WRITERS[path.suffix]} wrote")
    if path.suffix == ".npy":
        with _sentences(path):
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        return {"logits": StoredArray("logits", _word(mapped.dtype), mapped.shape, lambda: _plain(mapped))}
    with _sentences(path), zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        return {name.removesuffix(".npy"): _from_npz(path, archive, name) for name in members}


def _from_safetensors(tensor: StoredTensor) -> StoredArray:
    dtype = _WORDS.get(tensor.dtype, tensor.dtype)
    read = partial(from_bfloat16, tensor.data) if dtype == "bfloat16" else partial(_plain, tensor.data)
    return StoredArray(tensor.name, dtype, tensor.shape, read)


def _from_npz(path: Path, archive: zipfile.ZipFile, member: str) -> StoredArray:
    """Entry of an archive, by its header alone."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
    if dtype.hasobject:
        raise InputError("allow_pickle")

    def read() -> Array:
        with _sentences(path), np.load(path, allow_pickle=False) as arrays:
            return _plain(arrays[member.removesuffix(".npy")])

    return StoredArray(member.removesuffix(".npy"), _word(dtype), shape, read)


def _word(dtype: np.dtype[Any]) -> str:
    """Name of a format; two bytes of no kind are what NumPy makes of a bfloat16 array that JAX or ml_dtypes saved."""
    return "bfloat16" if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None else dtype.name


def _plain(array: Array) -> Array:
    """Numbers in the order of bytes of this machine; bfloat16 widened."""
    if array.dtype.kind == "V":
        return from_bfloat16(np.ascontiguousarray(array).view("<u2"))
    return np.asarray(array).astype(array.dtype.newbyteorder("="), copy=False)


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Turn what NumPy says of a file that it cannot read into a sentence."""
    wanted = f"expected what {_WRITERS[path.suffix]} writes; save it again"
    try:
        yield
    except MemoryError as error:
        raise InputError(f"{path} promises more numbers than fit into memory ({error}): {wanted}") from None
    except Exception as error:  # a damaged header goes through Python's tokenizer and parser, zip and zlib: any kind
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise InputError(f"{path} holds pickled objects, which are never opened: save plain numbers") from None
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path} is damaged or of another kind ({reason}): {wanted}") from None
