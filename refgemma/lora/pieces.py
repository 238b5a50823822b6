"""A matrix in pieces of some rows, and work on them side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

TILE = 2**18  # numbers; the half dozen float64 arrays of one piece are 2 MB each, near the processor


def pieces(shape: tuple[int, ...], rows: slice, numbers: int | None = None) -> Iterator[slice]:
    """Rows in pieces."""
    step = max(1, (numbers or TILE) // (shape[1] if len(shape) > 1 else 1))
    return (slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step))


def side_by_side(work: Callable[[slice], T], parts: Iterable[slice]) -> Iterator[T]:
    """Do some work for each piece, one thread a core."""
    from concurrent.futures import ThreadPoolExecutor  # takes long to import, and few need it

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            yield from pool.map(work, parts)
        except BaseException:  # Ctrl-C above all, which should not wait for gigabytes
            pool.shutdown(wait=False, cancel_futures=True)
            raise
