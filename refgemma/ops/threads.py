"""One pool of threads for everything large: products with weights, attention, the reading of a checkpoint.

Work is cut into parts, and every thread that is free takes the next one, the calling thread first of all; so a call
never waits for threads that are busy with another caller's work, and two generations in two Python threads share the
cores. NumPy lets go of the interpreter lock while it computes a part.

BLAS libraries bring threads of their own, one a core. Parts that run side by side must not each be split over the cores
once more, so BLAS is set to one thread before the first of them: once, for the whole process, and for good. A limit put
on and taken off around each product would be a race between two callers, because libraries know of no other.
"""

from __future__ import annotations

import contextvars
import functools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable

from refgemma.errors import InputError

Jobs = queue.SimpleQueue[Callable[[], object]]


def set_threads(count: int) -> None:
    """Choose how many threads large computations use.

    Parameters
    ----------
    count : int
        Of threads, the calling one included. 1 computes in the calling thread alone.

    Raises
    ------
    ValueError
        If it is no whole number from 1 on.

    Notes
    -----
    Before that, the environment variable ``REFGEMMA_THREADS`` counts, and without it as many threads as BLAS was set up
    to use: one a core, or what ``OPENBLAS_NUM_THREADS``, ``OMP_NUM_THREADS`` and their like say.

    Results may differ in their last bits between one number of threads and another; with the same number they do not.
    """
    global _chosen
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"the number of threads is {count!r}: expected a whole number from 1 on")
    _chosen = count


def threads() -> int:
    """Tell how many threads large computations use.

    Returns
    -------
    int
        The calling one included.

    Raises
    ------
    ValueError
        If the environment variable ``REFGEMMA_THREADS`` holds something else.
    """
    if _chosen is not None:
        return _chosen
    text = os.environ.get("REFGEMMA_THREADS", "")
    if not text:
        return _quieten_blas()
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"the environment variable REFGEMMA_THREADS is {text!r}: expected a whole number from 1 on")
    return int(text)


def in_parallel(work: Callable[[int], object], count: int) -> None:
    """Call ``work(0)`` to ``work(count - 1)``, side by side and in no order; return when all are done.

    Parameters
    ----------
    work : callable
        Computes one part.
    count : int
        Of parts.

    Raises
    ------
    BaseException
        What `work` raised first. Parts that were not begun by then are left out.
    """
    if count < 2:  # alone, and not worth a change to the whole process
        for part in range(count):
            work(part)
        return
    _quieten_blas()
    hands = min(threads(), count)
    todo = deque([*range(count), *[None] * hands])  # each thread stops at a None of its own
    done: list[int] = []  # how many each thread did that has stopped
    end: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()  # the caller is woken once

    def take_part() -> None:
        mine = 0
        try:
            while (part := todo.popleft()) is not None:
                work(part)
                mine += 1
        except BaseException as error:
            end.put(error)
            return
        done.append(mine)
        if sum(done) == count:  # who comes too late has done nothing, and nobody waits for it
            end.put(None)

    jobs = _jobs_of(hands - 1)
    for _ in range(hands - 1):
        # Each in a copy of the caller's context, where NumPy keeps what to do about floating-point errors.
        jobs.put(functools.partial(contextvars.copy_context().run, take_part))
    try:
        take_part()
        error = end.get()
        if error is not None:
            raise error
    finally:
        todo.clear()  # after an error, or Ctrl-C


# ---- state


class _Pool:
    """Threads, started as they are wanted, and the jobs that they wait for."""

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


def _jobs_of(count: int) -> Jobs:
    """Where the pool takes its jobs from, once it has at least so many threads."""
    pool = _pool
    if len(pool.threads) < count:
        with pool.lock:
            while len(pool.threads) < count:
                name = f"refgemma-{len(pool.threads) + 1}"
                thread = threading.Thread(target=_serve, args=(pool.jobs,), name=name, daemon=True)
                thread.start()
                pool.threads.append(thread)
    return pool.jobs


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
