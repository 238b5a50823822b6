"""What the machine can do, with nothing of a model around it: the limits that engines are held against.

How fast a float32 matrix larger than any cache streams through ``gemv``, how fast ``gemm`` computes, how fast the
bfloat16 matrices of the checkpoint itself are widened and multiplied tile by tile, and how fast the system hands out
memory that is new to a process. Each can be done in several ways, of which the best counts: BLAS divides the work, or
threads of ours take tiles of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from refgemma.compute.threads import in_parallel, threads
from refgemma.numerics import Array

_TILES = (2**20, 2**22)  # numbers that one thread takes at once; fewer are lost to Python
FRESH = 2**32  # bytes of new memory, or those of the model where that is less


def products(w: Array, x: Array) -> list[Callable[[], Array]]:
    """Product of a matrix with a vector (``gemv``) or with some (``gemm``), in every way. w (O, I), x (I,)."""
    return [divided_by_blas(w, x), *(tiled(w, x, tile) for tile in _TILES)]


def divided_by_blas(w: Array, x: Array) -> Callable[[], Array]:
    """Product that BLAS divides among as many threads as we use. w (O, I), x (I,)."""
    out = np.empty((len(w), *x.shape[1:]), np.float32)
    blas = ThreadpoolController().select(user_api="blas")

    def run() -> Array:
        with blas.limit(limits=threads()):
            return np.dot(w, x, out=out)

    return run


def tiled(w: Array, x: Array, tile: int) -> Callable[[], Array]:
    """Product of which threads of ours take tiles. w (O, I), x (I,)."""
    out = np.empty((len(w), *x.shape[1:]), np.float32)
    rows = max(1, tile // w.shape[1])
    parts = [slice(start, start + rows) for start in range(0, len(w), rows)]

    def run() -> Array:
        in_parallel(lambda part: np.dot(w[parts[part]], x, out=out[parts[part]]), len(parts))
        return out

    return run


def tile_loops(matrices: list[Array]) -> list[Callable[[], list[Array]]]:
    """Tile loops over the same matrices, in tiles of several sizes. matrices : list of (O, I)."""
    return [tile_loop(matrices, tile) for tile in _TILES]


def tile_loop(matrices: list[Array], tile: int) -> Callable[[], list[Array]]:
    """Products of bfloat16 matrices with a vector, widened by tiles, without a pause between one matrix and the next.

    matrices : list of (O, I).
    """
    rng = np.random.default_rng(4)
    x = {width: rng.standard_normal(width, np.float32) for width in {w.shape[1] for w in matrices}}
    tiles = [part for w in matrices for part in _parts(w, max(1, tile // w.shape[1]))]
    products = [np.empty(0, np.float32)] * len(tiles)

    def multiply(number: int) -> None:
        wide = tiles[number].astype(np.uint32)
        wide <<= np.uint32(16)  # bfloat16 is the upper half of a float32
        products[number] = np.dot(wide.view(np.float32), x[wide.shape[1]])

    def run() -> list[Array]:
        in_parallel(multiply, len(tiles))
        return products

    return run


def fill(size: int) -> None:
    """Fill memory that the system has not handed to this process before."""
    numbers = np.empty(size // 4, np.float32)
    tile = _TILES[-1]
    in_parallel(lambda part: numbers[part * tile : (part + 1) * tile].fill(1), -(-len(numbers) // tile))


def blas_name() -> str:
    """Say which BLAS it is, and for which processor it was told or found to compute."""
    library: dict[str, Any] = next(iter(ThreadpoolController().select(user_api="blas").info()), {})
    words = (library.get("internal_api"), library.get("version"), library.get("architecture"))
    return " ".join(str(word) for word in words if word)


def _parts(w: Array, rows: int) -> Iterator[Array]:
    return (w[start : start + rows] for start in range(0, len(w), rows))
