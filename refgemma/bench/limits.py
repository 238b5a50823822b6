"""What the machine can do, with no model around it, and how to time it.

How fast ``gemv`` streams a float32 matrix larger than any cache, how fast ``gemm`` computes, how fast the checkpoint's
bfloat16 matrices are widened and multiplied tile by tile, how fast the system provides memory that is new to a
process. Where there are several ways (BLAS divides the work, or our threads take tiles of it), the best counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from refgemma.compute.threads import in_parallel, threads
from refgemma.numerics import Array

FRESH = 2**32  # bytes of new memory, or those of the model where that is less
MOST_STEPS = 50  # of one decoder that is timed, the first included: a cache needs room for them
_TILES = (2**20, 2**22)  # numbers that one thread takes at once; with fewer, Python takes too much of the time
_ENOUGH = 2.0  # seconds spent on one measure, once it was repeated often enough
_TURNS = (5, 16)  # of works that take turns, at least and at most; up to three calls of each in a turn
_ENOUGH_TURNS = 6.0  # seconds spent on them
_WARM = 0.05  # seconds for which each is run untimed first, at most twice


def timings(work: Callable[[], object], *, least: int, most: int, enough: float = _ENOUGH) -> list[float]:
    """Time some work again and again."""
    seconds: list[float] = []
    while len(seconds) < least or (len(seconds) < most and sum(seconds) < enough):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def in_turn(*works: Callable[[], object]) -> list[float]:
    """Median seconds of works that take turns, so that a machine's slow moments fall on all of them.

    Each is run untimed first: memory and threads are cold, and BLAS threads of the work before may still spin.
    """
    turns: list[list[float]] = []
    start = time.perf_counter()
    while len(turns) < _TURNS[0] or (len(turns) < _TURNS[1] and time.perf_counter() - start < _ENOUGH_TURNS):
        turns.append([])
        for work in works:
            timings(work, least=1, most=2, enough=_WARM)
            turns[-1] += timings(work, least=1, most=1)
    return [statistics.median(seconds) for seconds in zip(*turns, strict=True)]


def products(w: Array, x: Array) -> list[Callable[[], Array]]:
    """Ways to multiply a matrix, w (O, I), with one vector (``gemv``), x (I,), or T of them (``gemm``), x (I, T)."""
    return [divided_by_blas(w, x), *(tiled(w, x, tile) for tile in _TILES)]


def divided_by_blas(w: Array, x: Array) -> Callable[[], Array]:
    """Product that BLAS divides among as many threads as refgemma uses."""
    out = np.empty((len(w), *x.shape[1:]), np.float32)
    blas = ThreadpoolController().select(user_api="blas")

    def run() -> Array:
        with blas.limit(limits=threads()):
            return np.dot(w, x, out=out)

    return run


def tiled(w: Array, x: Array, tile: int) -> Callable[[], Array]:
    """Product whose tiles refgemma's threads take."""
    out = np.empty((len(w), *x.shape[1:]), np.float32)
    rows = max(1, tile // w.shape[1])
    parts = [slice(start, start + rows) for start in range(0, len(w), rows)]

    def run() -> Array:
        in_parallel(lambda part: np.dot(w[parts[part]], x, out=out[parts[part]]), len(parts))
        return out

    return run


def tile_loops(matrices: list[Array]) -> list[Callable[[], list[Array]]]:
    """Tile loops over the same matrices, in tiles of several sizes."""
    return [tile_loop(matrices, tile) for tile in _TILES]


def tile_loop(matrices: list[Array], tile: int) -> Callable[[], list[Array]]:
    """Products of bfloat16 matrices (O, I) with vectors, widened by tiles, without a pause between matrices."""
    rng = np.random.default_rng(4)
    x = {width: rng.standard_normal(width, np.float32) for width in {w.shape[1] for w in matrices}}
    tiles = []
    for w in matrices:
        rows = max(1, tile // w.shape[1])
        tiles += [w[start : start + rows] for start in range(0, len(w), rows)]
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
    """Fill memory that is new to this process."""
    numbers = np.empty(size // 4, np.float32)
    tile = _TILES[-1]
    in_parallel(lambda part: numbers[part * tile : (part + 1) * tile].fill(1), -(-len(numbers) // tile))


def blas_name() -> str:
    """Name, version and kernels of BLAS."""
    library: dict[str, Any] = next(iter(ThreadpoolController().select(user_api="blas").info()), {})
    words = (library.get("internal_api"), library.get("version"), library.get("architecture"))
    return " ".join(str(word) for word in words if word)
