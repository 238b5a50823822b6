"""From the files of a model folder to parameters, strictly: every tensor accounted for, all problems in one error.

Matrices that are wanted as stored stay in the mapped files. Others are widened once, by tiles of rows, on all cores.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from refgemma.checkpoint.folder import read_folder
from refgemma.checkpoint.names import IGNORED, tensors_of
from refgemma.compute.threads import in_parallel
from refgemma.config import Config
from refgemma.device import placed
from refgemma.errors import InputError, all_problems, nearest_name
from refgemma.files.safetensors import FLOATS, StoredTensor, release_memory
from refgemma.numerics import Array, Bfloat16Matrix, from_bfloat16
from refgemma.params import Params, build

_TILE = 2**21  # numbers: a float32 tile of each thread stays in the last cache; smaller ones cost more Python
_LARGE = 2**24  # bytes of matrices that are worth using several threads

Progress = Callable[[int, int], None]


def load_params(
    folder: str | Path,
    config: Config,
    *,
    weights: str = "float32",
    norm_dtype: DTypeLike = np.float32,
    xp: Any = np,
    progress: Progress | None = None,
) -> Params:
    """Load the parameters of a model."""
    dtype_of_norms = np.dtype(norm_dtype)
    if weights not in ("bfloat16", "float32", "float64", "stored"):
        raise InputError(f"weights is {weights!r}: expected 'bfloat16', 'float32', 'float64' or 'stored'")
    if dtype_of_norms not in (np.float32, np.float64):
        raise InputError(f"norm_dtype is {dtype_of_norms}: expected float32 or float64")
    stored = read_folder(folder)
    check_tensors(stored, config, folder)
    if config.tie_word_embeddings and "lm_head.weight" in stored:
        _check_same_table(stored["model.embed_tokens.weight"], stored["lm_head.weight"])

    arrays: dict[str, Any] = {}
    to_widen: dict[str, Array | Bfloat16Matrix] = {}
    for tensor in tensors_of(config):
        source = stored[tensor.name]
        if len(tensor.shape) == 1:
            arrays[tensor.path] = _norm_weight(source, dtype_of_norms)
        elif weights in (FLOATS[source.dtype], "stored"):
            arrays[tensor.path] = source.matrix()
        elif weights == "bfloat16":
            raise InputError(
                f"{source.file} stores {source.name} as {source.dtype}, which weights='bfloat16' would round:"
                " ask for weights='float32'"
            )
        else:
            to_widen[tensor.path] = source.matrix()
    _warn_of_folded_norms([array for path, array in arrays.items() if path.endswith("norm")], folder)
    widen = _widened if xp is np else partial(_widened_there, xp)
    there = placed(arrays, xp) | widen(to_widen, weights, progress)
    arrays = {tensor.path: there[tensor.path] for tensor in tensors_of(config)}
    if config.tie_word_embeddings:
        arrays["head"] = arrays["embed"]
    return build(arrays)


def check_tensors(stored: dict[str, StoredTensor], config: Config, folder: str | Path) -> None:
    """Refuse a folder whose tensors are not those of the model; the error names every difference."""
    wanted = tensors_of(config)
    known = {tensor.name: tensor for tensor in tensors_of(replace(config, tie_word_embeddings=False))}
    ignored = {name.format(i=i) for name in IGNORED for i in range(config.num_layers)}
    unexpected = [name for name in stored if name not in known and name not in ignored]

    problems = []
    for tensor in wanted:
        if tensor.name not in stored:
            problems.append(f"missing {tensor.name}, shape {tensor.shape}{_hint('there is', tensor.name, unexpected)}")
    for name in unexpected:
        problems.append(f"unexpected {name!r}, shape {stored[name].shape}{_hint('nearest known name is', name, known)}")
    for name, tensor in known.items():
        if name in stored and stored[name].shape != tensor.shape:
            problems.append(f"{name} has shape {stored[name].shape}, expected {tensor.shape}, which is {tensor.axes}")
        if name in stored and stored[name].dtype not in ("BF16", "F16", "F32"):
            problems.append(f"{name} is stored as {stored[name].dtype}, expected BF16, F16 or F32")
    if problems:
        raise InputError(f"{folder} does not fit its configuration: {all_problems(problems)}")


def _hint(words: str, name: str, known: Iterable[str]) -> str:
    nearest = nearest_name(name, known)
    return f" ({words} {nearest!r})" if nearest else ""


def _check_same_table(embed: StoredTensor, head: StoredTensor) -> None:
    """Refuse a stored head that differs from the embedding, where the configuration ties the two."""
    # By tiles, because comparing takes as much memory as the tables; as bytes, because no NaN equals itself.
    same = embed.dtype == head.dtype and all(
        np.array_equal(embed.data[rows].view(np.uint8), head.data[rows].view(np.uint8)) for rows in _tiles(embed.shape)
    )
    if not same:
        raise InputError(
            f"{head.file} has an lm_head.weight that differs from model.embed_tokens.weight, yet tie_word_embeddings"
            " is true:"
            " set that to false in config.json to use the stored head, or remove the head to use the embedding"
        )


def _norm_weight(tensor: StoredTensor, dtype: np.dtype[Any]) -> Array:
    """Widened copy, checked to be finite."""
    with np.errstate(invalid="ignore"):  # NumPy warns of a signalling NaN; the error below says more
        weight = tensor.numbers().astype(dtype)
    bad = np.flatnonzero(~np.isfinite(weight))
    if bad.size:
        raise InputError(
            f"{tensor.file}: {tensor.name} holds {weight[bad[0]]} at channel {bad[0]}, expected finite numbers only:"
            " the file is damaged or its training diverged"
        )
    weight.flags.writeable = False
    return weight


def _warn_of_folded_norms(norms: list[Array], folder: str | Path) -> None:
    """Warn if norm weights hold 1 + w: adding the one again gives fluent nonsense, and no shape shows it.

    Training starts at w = 0 and leaves channels on both sides of it, some near -1; with the one folded in, all of them
    are positive and centre on 1 or above. That is likely, not certain, so not an error. Where it first happened:
    https://github.com/ggml-org/llama.cpp/pull/5631
    """
    every = np.concatenate(norms)
    if every.min() > 0 and every.mean() > 0.9:
        warnings.warn(
            f"{folder}: all norm weights are positive and their mean is {every.mean():.2f}, as if a GGUF converter had"
            " stored 1 + w for w; Gemma adds the 1 itself, so if that is so, subtract it from them",
            stacklevel=3,
        )


def _widened(matrices: dict[str, Array | Bfloat16Matrix], dtype: str, progress: Progress | None) -> dict[str, Array]:
    """Copies in another dtype, all tiles of all matrices in parallel."""
    wide = {path: np.empty(stored.shape, dtype) for path, stored in matrices.items()}
    tiles = [(stored, wide[path], rows) for path, stored in matrices.items() for rows in _tiles(stored.shape)]
    done, total, lock = 0, sum(stored.nbytes for stored in matrices.values()), threading.Lock()

    def one(number: int) -> None:
        nonlocal done
        stored, wide, rows = tiles[number]
        part = wide[rows]
        if not isinstance(stored, Bfloat16Matrix):
            part[...] = stored[rows]
        elif part.dtype == np.float32:
            from_bfloat16(stored.bits[rows], out=part)  # touching new memory takes longer than filling it
        else:
            part[...] = stored.rows(rows, part.dtype)
        release_memory(stored.bits[rows] if isinstance(stored, Bfloat16Matrix) else stored[rows])
        if progress:
            with lock:
                done += stored.nbytes // stored.shape[0] * len(part)
                progress(done, total)

    with np.errstate(invalid="ignore"):  # a NaN stays one, signalling or not
        if total > _LARGE:
            in_parallel(one, len(tiles))
        else:
            for number in range(len(tiles)):
                one(number)
    for matrix in wide.values():
        matrix.flags.writeable = False
    return wide


def _widened_there(
    xp: Any, matrices: dict[str, Array | Bfloat16Matrix], dtype: str, progress: Progress | None
) -> dict[str, Array]:
    """The same on a GPU: each matrix crosses as it is stored, and its stored copy is freed before the next one."""
    wide: dict[str, Array] = {}
    done, total = 0, sum(stored.nbytes for stored in matrices.values())
    for path, stored in matrices.items():
        there = placed(stored, xp)
        if isinstance(there, Bfloat16Matrix):
            wide[path] = there.rows(slice(None), np.dtype(dtype))
        else:
            wide[path] = there.astype(dtype)
        done += stored.nbytes
        if progress:
            progress(done, total)
    return wide


def _tiles(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the rows of a matrix, of about `_TILE` numbers each."""
    step = max(1, _TILE // shape[1])
    return (slice(start, start + step) for start in range(0, shape[0], step))
