"""The pool: every part once, whoever takes it, whatever goes wrong; and what it does to BLAS."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import refgemma
from refgemma.compute.threads import elementwise, in_parallel, mapped, threads
from tests.ops.weights import use_threads


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_every_part_is_done_once(workers, count, monkeypatch):
    use_threads(monkeypatch, workers)
    done = []
    in_parallel(done.append, count)
    assert sorted(done) == list(range(count))


def test_threads_work_side_by_side(monkeypatch):
    """Each part waits for the other, which would be for ever if one came after the other."""
    use_threads(monkeypatch, 2)
    both = threading.Barrier(2, timeout=20)
    in_parallel(lambda part: both.wait(), 2)


def test_a_caller_does_not_wait_for_threads_that_are_busy_elsewhere(monkeypatch):
    use_threads(monkeypatch, 2)
    busy, go_on = threading.Semaphore(0), threading.Event()

    def wait(part):
        busy.release()
        assert go_on.wait(20)

    other = threading.Thread(target=in_parallel, args=(wait, 2))
    other.start()
    for _ in range(2):
        assert busy.acquire(timeout=20)
    # The other caller holds itself and one thread; more may be left over from other tests, or none.
    done = []
    in_parallel(done.append, 10)
    assert sorted(done) == list(range(10))
    go_on.set()
    other.join()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("error", [IndexError, KeyboardInterrupt])
def test_an_error_comes_out_and_ends_the_work(workers, error, monkeypatch):
    use_threads(monkeypatch, workers)
    begun = []

    def work(part):
        begun.append(part)
        raise error("of a part")

    with pytest.raises(error, match=r"^of a part$"):
        in_parallel(work, 100)
    assert len(begun) <= workers
    done = []
    in_parallel(done.append, 3)  # the threads live on
    assert sorted(done) == [0, 1, 2]


def test_parts_see_what_the_caller_does_about_floating_point_errors(monkeypatch):
    use_threads(monkeypatch, 2)
    both = threading.Barrier(2, timeout=20)

    def divide(part):
        both.wait()  # so that two threads take one part each
        np.ones(1) / np.zeros(1)

    with np.errstate(divide="ignore"):
        in_parallel(divide, 2)
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        in_parallel(divide, 2)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_come_in_order_a_few_at_a_time(workers, count, monkeypatch):
    use_threads(monkeypatch, workers)
    begun = []
    results = mapped(lambda i: begun.append(i) or 2 * i, range(count))
    for i, result in enumerate(results):
        assert result == 2 * i
        assert len(begun) <= i + 4 * workers
    assert sorted(begun) == list(range(count))


def test_work_within_work(monkeypatch):
    use_threads(monkeypatch, 3)
    done = []
    in_parallel(lambda part: in_parallel(lambda inner: done.append((part, inner)), 4), 4)
    assert sorted(done) == [(part, inner) for part in range(4) for inner in range(4)]


# ---- how many


@pytest.fixture
def unchosen(monkeypatch):
    monkeypatch.setattr("refgemma.compute.threads._chosen", None)
    monkeypatch.delenv("REFGEMMA_THREADS", raising=False)


@pytest.mark.usefixtures("unchosen")
def test_who_says_how_many(monkeypatch):
    assert threads() >= 1
    monkeypatch.setenv("REFGEMMA_THREADS", "3")
    assert threads() == 3
    refgemma.set_threads(2)
    assert threads() == 2


@pytest.mark.usefixtures("unchosen")
@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_a_wrong_setting_is_one_clear_sentence(text, monkeypatch):
    monkeypatch.setenv("REFGEMMA_THREADS", text)
    with pytest.raises(ValueError, match=rf"^the environment variable REFGEMMA_THREADS is '{text}': expected a whole"):
        threads()


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "2", None])
def test_a_wrong_number_is_one_clear_sentence(count):
    with pytest.raises(ValueError, match=r"^the number of threads is .*: expected a whole number of at least 1$"):
        refgemma.set_threads(count)


_OF_BLAS = """
import numpy as np
from threadpoolctl import threadpool_info

def of_blas():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

before = of_blas()
import refgemma
from refgemma.ops.linear import linear
from refgemma.compute.threads import threads

linear(np.ones((1, 1, 8), np.float32), np.ones((8, 8), np.float32))
assert of_blas() == before, "importing and small products leave it alone"
linear(np.ones((1, 1, 2048), np.float32), np.ones((2048, 2048), np.float32))
assert of_blas() == [1] * len(before), of_blas()
assert threads() == max(before, default=threads()), (threads(), before)
"""


def test_the_first_large_product_sets_blas_to_one_thread():
    """And takes the number that it was set up with for its own."""
    environment = {name: value for name, value in os.environ.items() if name != "REFGEMMA_THREADS"}
    environment |= {"OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", _OF_BLAS], env=environment, check=True, timeout=60)


@pytest.mark.parametrize("part", [16, 2**18])
def test_the_result_is_in_memory_as_the_first_operand_is(part, monkeypatch):
    """Else a matrix product of it would add up in another order, by the size and by what a tap put in beside it."""
    monkeypatch.setattr("refgemma.compute.threads._PART", part)
    by_columns, by_rows = np.ones((8, 6)).T, np.ones((6, 8))
    assert elementwise(np.multiply, by_columns, by_rows).flags.f_contiguous
    assert elementwise(np.multiply, by_rows, by_columns).flags.c_contiguous
