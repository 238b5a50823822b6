"""One pool of threads for everything large: products with weights, attention, checkpoints, adapters.

Work is cut into parts, and every thread that is free takes the next one, the calling thread first of all. So a call
never waits for threads that are busy with another caller's work, and two generations in two Python threads share the
cores. NumPy releases the interpreter lock while it computes a part.

BLAS libraries bring threads of their own, one per core. Parts that run side by side must not each be split over the
cores again, so BLAS is set to one thread before the first of them: once, for the whole process, and for good. A limit
set and lifted around each product would be a race between two callers, because it applies to the whole process.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import Array

T = TypeVar("T")
R = TypeVar("R")
Jobs = queue.SimpleQueue[Callable[[], object]]

# Numbers that a thread takes at once in element-wise work. Fewer would stay in a core's own cache through all nine
# steps of GELU, but between two steps only one thread at a time can proceed.
_PART = 2**18


def set_threads(count: int) -> None:
    """Choose how many threads large computations use.

    Parameters
    ----------
    count : int
        Number of threads, the calling one included. 1 computes in the calling thread alone.

    Raises
    ------
    ValueError
        If it is not a whole number of at least 1.

    Notes
    -----
    Until this is called, the environment variable ``REFGEMMA_THREADS`` decides, and without it as many threads are used
    as BLAS was set up for: one per core, or what ``OPENBLAS_NUM_THREADS``, ``OMP_NUM_THREADS`` and the like say.

    Results may differ in their last bits between two numbers of threads; with the same number they do not.
    """
    global _chosen
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"the number of threads is {count!r}: expected a whole number of at least 1")
    _chosen = count


def threads() -> int:
    """How many threads large computations use, the calling one included."""
    if _chosen is not None:
        return _chosen
    text = os.environ.get("REFGEMMA_THREADS", "")
    if not text:
        return _of_blas or _quieten_blas()
    if not text.isdecimal() or int(text) < 1:
        raise InputError(
            f"the environment variable REFGEMMA_THREADS is {text!r}: expected a whole number of at least 1"
        )
    return int(text)


def in_parallel(work: Callable[[int], object], count: int) -> None:
    """Call ``work(0)`` to ``work(count - 1)``, side by side and in no order; return when all are done.

    What `work` raises first is raised here, and parts that were not begun by then are left out.
    """
    if count < 2:  # alone, and not worth a change to the whole process
        for part in range(count):
            work(part)
        return
    if _of_blas is None:
        _quieten_blas()
    workers = min(threads(), count)
    todo = deque([*range(count), *[None] * workers])  # each worker stops at a None of its own
    done: list[int] = []  # number of parts that each stopped worker did
    end: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()  # the caller is woken once

    def take_parts() -> None:
        mine = 0
        try:
            while (part := todo.popleft()) is not None:
                work(part)
                mine += 1
        except BaseException as error:
            end.put(error)
            return
        done.append(mine)
        if sum(done) == count:  # a late worker finds no parts left; nothing waits for it
            end.put(None)

    if len(_pool.threads) < workers - 1:
        _grow(workers - 1)
    for _ in range(workers - 1):
        # Each in a copy of the caller's context, where NumPy keeps what to do about floating-point errors.
        _pool.jobs.put(functools.partial(contextvars.copy_context().run, take_parts))
    try:
        take_parts()
        error = end.get()
        if error is not None:
            raise error
    finally:
        todo.clear()  # after an error, or Ctrl-C


def mapped(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results of some work on each item, in order; a few per thread at a time, so that a caller can report progress."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, 4 * threads())):
        yield from _all_of(work, batch)


def _all_of(work: Callable[[T], R], items: list[T]) -> list[R]:
    results: dict[int, R] = {}
    in_parallel(lambda i: results.__setitem__(i, work(items[i])), len(items))
    return [results[i] for i in range(len(items))]


def elementwise(work: Callable[..., Array], *inputs: Array) -> Array:
    """``work(*inputs)``, which computes number by number; threads take pieces of memory if the arrays are large.

    `work` takes the array for its result as an optional last argument. Arrays of different shapes or dtypes, and
    those of another library, are computed in one piece.
    """
    first = inputs[0]
    for x in inputs:
        if not isinstance(x, np.ndarray) or (x.shape, x.dtype) != (first.shape, first.dtype):
            return work(*inputs)
    out = np.empty_like(first)  # in memory as `first` is, whatever the size: products of it then have the same bits
    if first.size <= _PART:
        return work(*inputs, out)
    outermost = max(range(first.ndim), key=lambda axis: abs(first.strides[axis]) if first.shape[axis] > 1 else 0)
    turned = [np.moveaxis(array, outermost, 0) for array in (*inputs, out)]
    length = first.shape[outermost]
    step = max(1, _PART * length // first.size)
    parts = [slice(start, start + step) for start in range(0, length, step)]
    in_parallel(lambda part: work(*(array[parts[part]] for array in turned)), len(parts))
    return out


# ---- state


class _Pool:
    """Threads, started when they are first needed, and the jobs that they wait for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads: list[threading.Thread] = []
        self.jobs: Jobs = queue.SimpleQueue()


_chosen: int | None = None  # by the user
_of_blas: int | None = None  # threads that BLAS used before it was set to one
_pool = _Pool()


def _quieten_blas() -> int:
    """Set BLAS to one thread, the first time that this is called; how many it used before."""
    global _of_blas
    if _of_blas is None:
        with _pool.lock:
            if _of_blas is None:
                from threadpoolctl import ThreadpoolController  # looks through all loaded libraries: not on import

                blas = ThreadpoolController().select(user_api="blas")
                counts = [library["num_threads"] for library in blas.info()]
                blas.limit(limits=1)
                _of_blas = max(counts, default=os.cpu_count() or 1)
    return _of_blas


def _grow(count: int) -> None:
    """Start threads until the pool has that many."""
    pool = _pool
    with pool.lock:
        while len(pool.threads) < count:
            name = f"refgemma-{len(pool.threads) + 1}"
            thread = threading.Thread(target=_serve, args=(pool.jobs,), name=name, daemon=True)
            thread.start()
            pool.threads.append(thread)


def _serve(jobs: Jobs) -> None:
    """Life of a thread of the pool."""
    while True:
        jobs.get()()


def _forget_pool() -> None:
    """After a fork: the child has none of its parent's threads, and one of them may hold the lock."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
