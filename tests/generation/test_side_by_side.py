"""Two generations in two Python threads, which share the pool: each as if it were alone, to the last bit."""

import threading

import pytest

import refgemma.compute.products as tiles
from refgemma.compute import threads
from refgemma.numerics import FLOAT32
from tests.generation.runs import SETTINGS, results

PROMPTS = ([2, 30, 31], [2, 60, 61, 62, 63])
TIMES = 3


@pytest.fixture
def parts_taken_by(monkeypatch):
    """Threads that took a part, where even the products of a small model are cut into many."""
    for name, small in (("_TILE", 200), ("_ROWS", 3), ("_WORTH", 1), ("_WORTH_TURNING", 1)):
        monkeypatch.setattr(tiles, name, small)
    monkeypatch.setattr(threads, "_chosen", 3)
    seen, in_parallel = set(), tiles.in_parallel

    def watched(work, count):
        def one(part):
            seen.add(threading.get_ident())
            work(part)

        in_parallel(one, count)

    monkeypatch.setattr(tiles, "in_parallel", watched)
    return seen


@pytest.mark.parametrize("xp", ["numpy"], indirect=True)  # the pool is for the processor
def test_two_generations_in_two_threads_are_those_of_one(run, model, parts_taken_by):
    def written(prompt):
        [result] = results(run(prompt, numerics=FLOAT32, params=model.params, record=True, **SETTINGS))
        return result.tokens, [row.tobytes() for row in result.record.logits]

    want = [written(prompt) for prompt in PROMPTS]
    assert want[0] != want[1]
    assert len(parts_taken_by) > 1
    got = ([], [])

    def go_on(i):
        got[i].extend(written(PROMPTS[i]) for _ in range(TIMES))

    both = [threading.Thread(target=go_on, args=(i,)) for i in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    for i in range(2):
        assert got[i] == [want[i]] * TIMES
    assert {thread.ident for thread in both} <= parts_taken_by
