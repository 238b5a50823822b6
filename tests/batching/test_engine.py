"""Requests from many threads: none is lost, mixed up or left waiting, whatever others do; nothing stays behind."""

import asyncio
import gc
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from refgemma.batching import Batching, Closed, Full
from refgemma.batching.batch import Batch
from refgemma.gemma import Gemma
from refgemma.lora.attach import attach
from refgemma.lora.fit import Replaced
from refgemma.numerics import FLOAT32
from refgemma.sampling import SamplingParams
from tests.batching.requests import QUESTIONS, adapter, alone, asked, random_asked
from tests.talker import talker
from tests.tiny_it import tiny_it

SOON = 60  # seconds that no step of a test comes near; beyond, something hangs


@pytest.fixture(scope="module")
def small(small_tokenizer):
    """A model that writes until it is stopped."""
    model = talker(max_positions=64)
    return Gemma(model.config, model.params, small_tokenizer, FLOAT32, frozenset())


@pytest.fixture
def gate():
    """A callback that stays where it is called, and with it the worker; `entered` and `opened` are events."""

    class Gate:
        def __init__(self):
            self.entered, self.opened = threading.Event(), threading.Event()

        def __call__(self, event):
            self.entered.set()
            assert self.opened.wait(SOON)

    gate = Gate()
    yield gate
    gate.opened.set()


def settings(max_tokens=5, **others):
    return SamplingParams(**{"seed": 1, "max_tokens": max_tokens} | others)


def submit(engine, one, **options):
    prompt, how, name = one
    return engine.submit(prompt, how, adapter=adapter(name), **options)


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "refgemma-batching"]


# ---- many at once


def test_requests_of_many_threads_are_neither_lost_nor_mixed_up():
    """In float64, where no decision of these is within 1e-12 of being another one."""
    gemma = tiny_it("float64")
    many = random_asked(gemma, 32, seed=4)
    want = [alone(gemma, *one) for one in many]
    together = threading.Barrier(len(many))
    with Batching(gemma, max_rows=5, max_waiting=32) as engine, ThreadPoolExecutor(len(many)) as pool:

        def ask(one):
            together.wait(SOON)
            return list(submit(engine, one))

        answers = list(pool.map(ask, many))
    assert [events[-1].result for events in answers] == want
    for events in answers:
        assert [event.token for event in events] == events[-1].result.tokens
        assert [event.result for event in events[:-1]] == [None] * (len(events) - 1)
    assert not workers()


def test_an_asyncio_program_takes_events_by_callback(small):
    async def ask(engine, length):
        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        engine.submit([2] * length, settings(), on_event=lambda e: loop.call_soon_threadsafe(events.put_nowait, e))
        told = [await asyncio.wait_for(events.get(), SOON)]
        while told[-1].result is None:
            told.append(await asyncio.wait_for(events.get(), SOON))
        return told

    async def ask_all(engine):
        return await asyncio.gather(*(ask(engine, length) for length in (1, 2, 3)))

    with Batching(small) as engine:
        told = asyncio.run(ask_all(engine))
    for length, events in zip((1, 2, 3), told, strict=True):
        with Batching(small) as engine:
            assert [event.result for event in events] == [e.result for e in engine.submit([2] * length, settings())]


def test_a_callback_may_ask_for_more(small):
    answers = []
    with Batching(small, max_rows=1) as engine:

        def ask_again(event):
            if event.result is not None:
                answers.append(event.result)
                if len(answers) < 3:
                    engine.submit(event.result.tokens, settings(), on_event=ask_again)

        first = engine.submit([2], settings(), on_event=ask_again)
        with pytest.raises(TypeError, match=r"^the events of this request go to its on_event"):
            next(first)
        while len(answers) < 3 and workers():
            workers()[0].join(SOON)
    assert len({tuple(answer.tokens) for answer in answers}) == 3


def test_a_slow_reader_holds_up_nobody(small):
    with Batching(small) as engine:
        slow, quick = engine.submit([2], settings(30)), engine.submit([2, 3], settings(30))
        assert len(list(quick)) == 30
        while workers():
            workers()[0].join(SOON)
        assert len(list(slow)) == 30  # kept for it, although all work is done


# ---- bounds


def test_a_full_engine_says_so(small, gate):
    with Batching(small, max_rows=2, max_waiting=3) as engine:
        engine.submit([2], settings(), on_event=gate)
        assert gate.entered.wait(SOON)
        streams = [engine.submit([2, i], settings()) for i in range(4)]  # one row is free, three may wait
        with pytest.raises(Full, match=r"^2 requests are in work and 3 wait: come again later$"):
            engine.submit([2], settings())
        assert repr(engine) == "Batching: 1 of 2 rows at work, 4 waiting"
        streams[1].cancel()
        streams[1] = engine.submit([2, 9], settings())  # who has left makes room
        gate.opened.set()
        assert [len(list(stream)) for stream in streams] == [5] * 4
        assert len(list(engine.submit([2], settings()))) == 5


def test_requests_are_answered_in_the_order_in_which_they_came(small, gate):
    order = []
    with Batching(small, max_rows=2) as engine:
        engine.submit([2], settings(1), on_event=gate)
        assert gate.entered.wait(SOON)
        for i in range(9):
            engine.submit([2] * (9 - i), settings(1), on_event=lambda _, i=i: order.append(i))
        gate.opened.set()
    assert order == list(range(9))


def test_bad_requests_are_refused_at_once(small):
    with Batching(small) as engine:
        with pytest.raises(ValueError, match=r"^the prompt has no tokens"):
            engine.submit([], settings())
        with pytest.raises(ValueError, match=r"^the prompt has 64 tokens, too many for a context of 64"):
            engine.submit([2] * 64, settings())
    for wrong in ({"max_rows": 0}, {"max_rows": 1.5}, {"max_waiting": -1}):
        with pytest.raises(ValueError, match=rf"^{next(iter(wrong))} is .*: expected a whole number"):
            Batching(small, **wrong)
    with pytest.raises(ValueError, match=r"^the model has an adapter for some rows of a batch: give adapters with"):
        Batching(tiny_it().with_lora(adapter("json"), rows=[True, False]))
    assert not workers()


def test_an_adapter_that_cannot_share_a_batch_is_refused_at_once(small, monkeypatch):
    change = Replaced("layers.0.attn.q", small.params["layers"][0]["attn"]["q"] * 2)
    whole = Gemma(small.config, attach(small.params, [change]), small.tokenizer, FLOAT32, frozenset())
    monkeypatch.setattr(Gemma, "with_lora", lambda self, adapter: whole)
    with Batching(small) as engine, pytest.raises(ValueError, match=r"^an adapter holds layers\.0\.attn\.q trained"):
        engine.submit([2], settings(), adapter=adapter("json"))


# ---- leaving


def test_cancelling_releases_whoever_waits(small, gate):
    with Batching(small, max_rows=1) as engine:
        engine.submit([2], settings(), on_event=gate)
        assert gate.entered.wait(SOON)
        queued = engine.submit([2], settings())
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(list, queued)
            queued.cancel()
            assert waiting.result(SOON) == []  # while the worker is busy with another
        gate.opened.set()
    assert list(queued) == []


def test_a_stream_that_is_dropped_is_cancelled(small, gate):
    with Batching(small) as engine:
        engine.submit([2], settings(), on_event=gate)
        assert gate.entered.wait(SOON)
        stream, kept = engine.submit([2], settings(50)), engine.submit([2], settings(50))
        dropped, others = stream._request, kept._request
        del stream
        gc.collect()
        assert dropped.cancelled
        assert not others.cancelled
        gate.opened.set()
        assert len(list(kept)) == 50
    assert dropped.row.output == []


def test_closing_waits_for_all(small):
    engine = Batching(small, max_rows=2)
    streams = [engine.submit([2, i], settings(20)) for i in range(6)]
    engine.close()
    assert not workers()
    assert [len(list(stream)) for stream in streams] == [20] * 6
    with pytest.raises(Closed, match=r"^this engine was closed: it takes no more requests$"):
        engine.submit([2], settings())
    engine.close()
    assert repr(engine) == "Batching: 0 of 2 rows at work, 0 waiting, closed"


def test_closing_in_a_hurry_stops_all(small, gate):
    engine, told = Batching(small, max_rows=2), []

    def close(event):
        gate(event)
        told.append(event)
        engine.close(timeout=0)  # in the worker itself, and so between two steps for sure

    engine.submit([2], settings(50), on_event=close)
    assert gate.entered.wait(SOON)
    streams = [engine.submit([2, i], settings(50)) for i in range(3)]
    gate.opened.set()
    for stream in streams:
        with pytest.raises(Closed, match=r"^the engine was closed before this answer was finished$"):
            list(stream)
        assert list(stream) == []
    engine.close(timeout=0)
    assert not workers()
    # What the step that was under way still wrote, and the end.
    assert len(told) == 3
    assert isinstance(told[-1], Closed)


def test_a_block_waits_for_all_unless_an_exception_leaves_it(small, monkeypatch):
    calls = []
    monkeypatch.setattr(Batching, "close", lambda self, timeout: calls.append(timeout))
    with Batching(small):
        pass
    with pytest.raises(KeyError), Batching(small):
        raise KeyError
    assert calls == [None, 0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_tells_everybody(small, gate, monkeypatch):
    def broken(self):
        raise SystemError("out of order")

    engine = Batching(small, max_rows=2)
    engine.submit([2], settings(), on_event=gate)
    assert gate.entered.wait(SOON)
    streams = [engine.submit([2], settings()) for _ in range(4)]
    monkeypatch.setattr(Batch, "step", broken)
    (worker,) = workers()
    gate.opened.set()
    worker.join(SOON)
    assert not any(stream._events.empty() for stream in streams)  # else the next line would wait for ever
    for stream in streams:
        with pytest.raises(Closed, match=r"^the worker of this engine died: SystemError: out of order$"):
            list(stream)
    with pytest.raises(Closed):
        engine.submit([2], settings())
    engine.close()


PROGRAM = """
import refgemma
from refgemma.batching import Batching
gemma = refgemma.load("tiny-it")
endless = refgemma.SamplingParams(max_tokens=8000, seed=1, banned=gemma.stop_ids)
stream = Batching(gemma).submit(gemma.encode_prompt("Tell me a story."), endless)
print(next(stream).token >= 0)
"""


def test_a_program_may_end_without_closing():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=SOON, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


# ---- numbers that overflow


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_an_adapter_whose_numbers_overflow_hurts_its_own_request_alone():
    """The other rows of its passes say what they say alone, in float64, where no decision of these is close."""
    gemma = tiny_it("float64")
    modules = {
        name: parts | {"lora_magnitude_vector": np.full(parts["lora_magnitude_vector"].shape, 1e308)}
        for name, parts in adapter("pirate").modules.items()
    }
    broken = replace(adapter("pirate"), modules=modules)
    many = [asked(gemma, question) for question in QUESTIONS] + [asked(gemma, name="pirate")]
    with Batching(gemma) as engine:
        streams = [submit(engine, one) for one in many]
        failing = engine.submit(*many[0][:2], adapter=broken)
        answers = [list(stream)[-1].result for stream in streams]
        with pytest.raises(ValueError, match=r"^logits "):
            list(failing)
    assert answers == [alone(gemma, *one) for one in many]


# ---- nothing piles up


def test_a_request_that_has_ended_keeps_no_cache(small, gate):
    with Batching(small, max_rows=3) as engine:
        ended, cut = engine.submit([2], settings(3)), engine.submit([2], settings(50))
        assert next(cut)
        cut.cancel()
        assert len(list(ended)) == 3
    dropped = Batching(small)
    stream = dropped.submit([2], settings(50), on_event=gate)
    assert gate.entered.wait(SOON)
    dropped._deadline = 0
    gate.opened.set()
    dropped.close()
    assert [one._request.cache for one in (ended, cut, stream)] == [None] * 3


def test_memory_stays_flat_over_many_requests(small):
    rng = np.random.default_rng(6)

    def ask(engine, count):
        for _ in range(count // 50):
            streams = [engine.submit([2] * int(rng.integers(1, 9)), settings(1, seed=None)) for _ in range(50)]
            for stream in streams[::2]:
                assert len(list(stream)) == 1
            del stream, streams  # and the other half is dropped half-way, or before it began

    with Batching(small, max_waiting=100) as engine:
        ask(engine, 100)
        tracemalloc.start()
        try:
            ask(engine, 100)
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            ask(engine, 1900)
            engine.close()
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # A request that was kept, of the 1,900, would show by its cache alone: 2 layers, keys and values, 2 heads of 6
    # floats, 2 slots at least: 384 bytes. Thread bookkeeping and interned numbers come and go.
    assert after - before < 1900 * 384 / 10
    assert len(engine._waiting) == len(engine._batch) == 0
