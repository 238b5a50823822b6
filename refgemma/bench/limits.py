"""The process that measures what the machine can do: ``python -m refgemma.bench.limits FOLDER``.

Four limits, with nothing of a model around them: how fast a float32 matrix larger than any cache streams through
``gemv``, how fast ``gemm`` computes, how fast the bfloat16 matrices of the checkpoint itself are widened and multiplied
tile by tile, and how fast the system hands out memory that is new to a process. Each is the best of several ways: BLAS
divides the work, or threads of ours take tiles of it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from refgemma.bench import counts, plan
from refgemma.checkpoint.folder import read_folder
from refgemma.config import Config, read_config
from refgemma.numerics import Array
from refgemma.ops.threads import in_parallel

Share = Callable[[Callable[[int], object], int], None]  # how the parts of some work are done, as `in_parallel` does it

# Bytes of the float32 matrix: as many as the model has, but no more than are needed to outgrow every cache.
_LEAST, _MOST = 2**26, 2**30
_TILES = (2**18, 2**19, 2**20, 2**22)  # numbers that one thread takes at once
_BLOCKS = (2**22, 2**25, _MOST)  # numbers that BLAS takes at once: a small matrix of a model, a large one, everything
_WORK = 10**10  # operations of one timing of gemm, or those of a prompt where that is less
_ROWS = (128, 512)  # fed to gemm
_FRESH = 2**32  # bytes of new memory, or those of the model where that is less


def main(folder: Path) -> None:
    """Measure the limits.

    Parameters
    ----------
    folder : Path
        A model in bfloat16.
    """
    config = read_config(folder)
    controller = ThreadpoolController().select(user_api="blas")
    threads = max((library["num_threads"] for library in controller.info()), default=1)
    plan.say("about", threads=threads, blas=_name(controller))
    for name, rate in _float32_rates(config).items():
        plan.say(name, rate=rate)
    stored = read_folder(folder)
    bits = [stored[tensor.theirs].data for tensor in counts.multiplied(config)]
    plan.say("tiles", seconds=[min(_best(tile_loop(bits, tile)) for tile in _TILES)])
    size = min(_FRESH, 4 * config.num_parameters)
    plan.say("fresh", rate=size / _best(lambda: _fresh(size)))


def _float32_rates(config: Config) -> dict[str, float]:
    """The best of gemv, bytes a second, and of gemm, operations a second."""
    numbers = np.ones(max(_LEAST, min(_MOST, 4 * counts.weights_read(config))) // 4, np.float32)
    widths = (config.hidden_size, config.intermediate_size)
    large = [numbers[: len(numbers) // width * width].reshape(-1, width) for width in widths]
    of_mlp = [w[:out] for w, out in zip(large, reversed(widths), strict=True)]
    gemv = [(w, np.ones(w.shape[1], np.float32)) for w in large]
    gemm = [(w, np.ones((w.shape[1], rows), np.float32)) for w in of_mlp for rows in _ROWS]
    work = min(_WORK, counts.operations(config, tokens=plan.SHORT))
    rates = {
        "gemv": [_gemv_rate(*each, tile) for each in gemv for tile in _BLOCKS],
        "gemm": [_gemm_rate(work, *each, _BLOCKS[-1]) for each in gemm],
    }
    # From here on BLAS has one thread: the first part that is done in parallel sees to that.
    rates["gemv"] += [_gemv_rate(*each, tile, in_parallel) for each in gemv for tile in _TILES]
    rates["gemm"] += [_gemm_rate(work, *each, tile, in_parallel) for each in gemm for tile in _TILES[-2:]]
    return {name: max(found) for name, found in rates.items()}


def one_by_one(work: Callable[[int], object], count: int) -> None:
    """Do the parts of some work one after another, as `in_parallel` does them side by side.

    Parameters
    ----------
    work : callable
        Computes one part.
    count : int
        Of parts.
    """
    for part in range(count):
        work(part)


def product(w: Array, x: Array, tile: int, share: Share = one_by_one) -> Callable[[], Array]:
    """Product of a matrix with a vector or with some, tile by tile.

    Parameters
    ----------
    w : ndarray of float32, shape (O, I)
        The matrix.
    x : ndarray of float32, shape (I,) or (I, T)
        The vectors.
    tile : int
        About how many numbers of the matrix are taken at once.
    share : callable
        Does the parts. By default they come one after another, and BLAS divides each.

    Returns
    -------
    callable
        Computes it, shape (O,) or (O, T); the same array each time.
    """
    out = np.empty((len(w), *x.shape[1:]), np.float32)
    rows = max(1, tile // w.shape[1])
    parts = [slice(start, start + rows) for start in range(0, len(w), rows)]

    def run() -> Array:
        share(lambda part: np.dot(w[parts[part]], x, out=out[parts[part]]), len(parts))
        return out

    return run


def tile_loop(matrices: list[Array], tile: int) -> Callable[[], list[Array]]:
    """Products of bfloat16 matrices with a vector, widened by tiles, without a pause between one matrix and the next.

    Parameters
    ----------
    matrices : list of ndarray of uint16, shape (O, I)
        Bits of each.
    tile : int
        Numbers of a tile, about.

    Returns
    -------
    callable
        Computes them; the products of all tiles, (rows,) each, in order.
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


def _fresh(size: int) -> None:
    """Fill some bytes of memory that the system has not handed to this process before."""
    numbers = np.empty(size // 4, np.float32)
    tile = _TILES[-1]
    in_parallel(lambda part: numbers[part * tile : (part + 1) * tile].fill(1), -(-len(numbers) // tile))


def _parts(w: Array, rows: int) -> Iterator[Array]:
    return (w[start : start + rows] for start in range(0, len(w), rows))


def _gemv_rate(w: Array, x: Array, *shared: Any) -> float:
    """Bytes a second of a product that reads a large matrix once."""
    return float(w.nbytes) / _best(product(w, x, *shared))


def _gemm_rate(work: int, w: Array, x: Array, *shared: Any) -> float:
    """Operations a second of a product that uses each weight often, done until there is enough work to be timed."""
    each: int = 2 * w.size * x.shape[1]
    times = math.ceil(work / each)
    once = product(w, x, *shared)

    def all_of_it() -> None:
        for _ in range(times):
            once()

    return times * each / _best(all_of_it)


def _best(work: Callable[[], object]) -> float:
    """Shortest time of some work, once memory and threads are warm."""
    work()
    return min(plan.timings(work, least=3, most=20, enough=0.3))


def _name(controller: ThreadpoolController) -> str:
    """Which BLAS, and for which processor it was told or found to compute."""
    library: dict[str, Any] = next(iter(controller.info()), {})
    words = (library.get("internal_api"), library.get("version"), library.get("architecture"))
    return " ".join(str(word) for word in words if word)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
