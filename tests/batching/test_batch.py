"""A batch, driven step by step: every answer is the one its request gets alone, whoever comes, goes or fails."""

import asyncio
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from refgemma import generation
from refgemma.batching import batch as batch_module
from refgemma.batching.batch import Batch
from refgemma.cache import KVCache
from refgemma.lora.attach import attach
from refgemma.lora.fit import LowRank
from refgemma.sampling import SamplingParams, decide, uniform
from refgemma.sampling.near_tie import nearest_flip
from tests.batching.requests import ADAPTERS, QUESTIONS, alone, asked, params, random_asked, request, run
from tests.tiny_it import recorded, tiny_it


def together(gemma, many, *, rows=6, seed=0):
    """Results of requests that arrive a few at a time, while others are being read or written."""
    rng = np.random.default_rng(seed)
    batch, told, waiting = Batch(gemma), [], list(many)
    while waiting or len(batch):
        for _ in range(rng.integers(3)):
            if waiting and len(batch) < rows:
                new, events = request(gemma, *waiting.pop(0))
                batch.joining.append(new)
                told.append(events)
        batch.step()
    for events in told:
        assert "".join(event.text for event in events) == events[-1].result.text
        assert [event.token for event in events] == events[-1].result.tokens
    return [events[-1].result for events in told]


# ---- alone or in company


def test_every_answer_is_that_of_the_request_alone(monkeypatch):
    """In float64, where no decision of these is within 1e-12 of being another one."""
    gemma = tiny_it("float64")
    many = random_asked(gemma, 40, seed=1)
    want = [alone(gemma, *one) for one in many]
    monkeypatch.setattr(generation, "CHUNK", 16)  # most prompts take several steps
    assert together(gemma, many) == want
    # It can fail: what is asked, how, and with which adapter all show.
    assert len({tuple(result.tokens) for result in want}) > 30
    assert Counter(result.finish_reason for result in want)["stop"] > 5


def test_float32_differs_at_near_ties_alone(monkeypatch):
    gemma = tiny_it()
    many = random_asked(gemma, 40, seed=2)
    monkeypatch.setattr(generation, "CHUNK", 16)
    results = together(gemma, many)
    monkeypatch.undo()
    for one, got in zip(many, results, strict=True):
        want = alone(gemma, *one, record=True)
        assert parted_without_reason(one, got.tokens, want) is None


def test_a_difference_that_is_no_near_tie_is_noticed():
    gemma = tiny_it()
    one = asked(gemma, temperature=1.0)
    want = alone(gemma, *one, record=True)
    assert parted_without_reason(one, want.tokens, want) is None
    assert parted_without_reason(one, [*want.tokens[:3], want.tokens[3] + 1], want) == 3
    assert parted_without_reason(one, want.tokens[:-1], want) == len(want.tokens) - 1


def parted_without_reason(one, tokens, want):
    """Step at which tokens leave those of the request alone, unless that was a near-tie."""
    prompt, settings, _ = one
    if tokens == want.tokens:
        return None
    t = next((t for t, pair in enumerate(zip(tokens, want.tokens, strict=False)) if pair[0] != pair[1]), None)
    if t is None:
        return min(len(tokens), len(want.tokens))
    logits = want.record.logits[t].astype(np.float64)
    decision = decide(logits, settings, prompt, want.tokens[:t], uniform(want.seed, t), record=True)
    # Each of the two runs may be off the truth by the float32 bound; adapters of rank 8 add less than they share.
    bound = 2 * max(prompt.float32_bound for prompt in recorded().values()) * np.abs(logits).max()
    return None if nearest_flip(logits, settings, decision).size <= bound else t


def test_adapters_of_other_rows_are_noticed(monkeypatch):
    gemma = tiny_it("float64")
    many = [asked(gemma, name=name, temperature=0) for name in ADAPTERS]
    want = [alone(gemma, *one) for one in many]
    assert together(gemma, many) == want
    right = batch_module.for_rows
    monkeypatch.setattr(batch_module, "for_rows", lambda base, own: right(base, own[::-1]))
    assert together(gemma, many) != want


def test_keys_of_other_rows_are_noticed(monkeypatch):
    gemma = tiny_it("float64")
    many = [asked(gemma, question, max_tokens=30) for question in QUESTIONS]
    want = [alone(gemma, *one) for one in many]
    assert together(gemma, many) == want
    right = batch_module.join_rows

    def rolled(*args, **options):
        cache = right(*args, **options)
        cache.keys = [np.roll(keys, 1, axis=0) for keys in cache.keys]
        return cache

    monkeypatch.setattr(batch_module, "join_rows", rolled)
    assert together(gemma, many) != want


def test_decisions_are_told_where_they_are_to_be_recorded():
    gemma = tiny_it("float64")
    one, batch = asked(gemma, temperature=1.0), Batch(gemma)
    (first, recorded_events), (second, plain_events) = request(gemma, *one, record=True), request(gemma, *one)
    batch.joining.extend((first, second))
    run(batch)
    want = alone(gemma, *one, record=True)
    assert recorded_events[-1].result.record.tokens == tuple(want.tokens)
    assert recorded_events[-1].result.record.replay().first_difference is None
    assert [event.decision.token for event in recorded_events] == want.tokens
    # Elsewhere they would be megabytes for every token that a slow reader has yet to take.
    assert {event.decision for event in plain_events} == {None}
    assert plain_events[-1].result.record is None


# ---- coming and going


@pytest.fixture
def passes(monkeypatch):
    """Shapes of all passes of the model, in turn."""
    shapes = []
    for module in (generation, batch_module):
        forward = module.forward

        def counted(params, config, tokens, *, forward=forward, **options):
            shapes.append(tokens.shape)
            return forward(params, config, tokens, **options)

        monkeypatch.setattr(module, "forward", counted)
    return shapes


def endless(gemma, length=3, max_tokens=1000, **options):
    """A request for so many tokens, whatever they are."""
    settings = SamplingParams(seed=length, max_tokens=max_tokens)
    return request(gemma, [2] * length, settings, stop_ids=frozenset(), **options)


def test_a_long_prompt_holds_up_nobody_by_more_than_a_chunk(passes, monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", 8)
    gemma, batch = tiny_it(), Batch(tiny_it())
    writer, written = endless(gemma)
    reader, read = endless(gemma, 27)
    batch.joining.append(writer)
    batch.step()
    assert passes == [(1, 3), (1, 1)]
    batch.joining.append(reader)
    for step in range(4):
        assert (len(written), len(read)) == (2 + step, 0)
        batch.step()
    assert passes[2:] == [(1, 8), (1, 1), (1, 8), (1, 1), (1, 8), (1, 1), (1, 3), (2, 1)]
    assert (len(written), len(read)) == (6, 2)


def test_prompts_are_read_in_turn_as_many_as_make_a_chunk(passes, monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", 8)
    batch, told = Batch(tiny_it()), []
    for length in (3, 4, 2, 9, 1):
        new, events = endless(batch._gemma, length)
        batch.joining.append(new)
        told.append(events)
    firsts = []
    while batch.joining:
        batch.step()
        firsts.append([bool(events) for events in told].count(True))
    assert firsts == [2, 3, 3, 5]  # 3 + 4; 2, after which 8 of the 9 do not fit; those 8; 1 + 1


def test_live_keys_are_copied_only_where_rows_come_or_go(monkeypatch):
    copies = []
    copy = batch_module.join_rows
    monkeypatch.setattr(
        batch_module, "join_rows", lambda rows, *a, **k: copies.append(len(rows)) or copy(rows, *a, **k)
    )
    batch = Batch(tiny_it())
    first, second, third = (
        endless(batch._gemma, length, max_tokens)[0] for length, max_tokens in ((3, 9), (2, 9), (40, 4))
    )
    batch.joining.append(first)
    batch.step()
    batch.step()
    assert copies == []  # a request alone stays where it was read
    batch.joining.extend((second, third))
    batch.step()
    batch.step()
    assert copies == [3]  # both at once
    assert batch.live[0].cache.length == 42
    batch.step()  # the third has its four tokens
    assert [len(batch.live), copies] == [2, [3]]
    batch.step()
    assert copies == [3, 2]
    assert batch.live[0].cache.length == 3 + 6  # dead slots are gone: as long as the longest row that is left
    assert batch.live[0].cache.positions.shape == (2, 3 + 9)
    run(batch)
    assert copies == [3, 2, 1]


def test_cancelling_stops_a_row_before_the_next_pass(passes):
    batch = Batch(tiny_it())
    (stays, kept), (goes, dropped) = endless(batch._gemma, max_tokens=6), endless(batch._gemma, 5)
    batch.joining.extend((stays, goes))
    for _ in range(3):
        batch.step()
    assert len(dropped) == 4
    goes.cancelled = True
    del passes[:]
    run(batch)
    assert len(dropped) == 4
    assert passes == [(1, 1)] * 2
    assert kept[-1].result is not None
    assert batch._params is batch._gemma.params


def test_cancelling_between_the_chunks_of_a_prompt(passes, monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", 8)
    batch = Batch(tiny_it())
    goes, dropped = endless(batch._gemma, 100)
    batch.joining.append(goes)
    batch.step()
    goes.cancelled = True
    run(batch)
    assert passes == [(1, 8)]
    assert dropped == []


def test_a_row_that_cancels_itself_when_told_is_told_nothing_more():
    batch, told = Batch(tiny_it()), []
    new, _ = endless(batch._gemma)

    def stop(event):
        told.append(event)
        new.cancelled = len(told) == 2

    new.on_event = stop
    batch.joining.append(new)
    run(batch)
    assert len(told) == 2


# ---- failures


def test_a_row_that_fails_leaves_the_others_alone():
    """Its keys turn into NaN, in the very cache that all share."""
    gemma, batch = tiny_it("float64"), Batch(tiny_it("float64"))
    many = random_asked(gemma, 5, seed=5)
    many = [(prompt, replace(settings, max_tokens=12, stop=()), name) for prompt, settings, name in many]
    told = []
    for one in many:
        new, events = request(gemma, *one)
        batch.joining.append(new)
        told.append(events)
    batch.step()
    batch.step()
    bad = batch.live[2]
    assert len({id(live.cache) for live in batch.live}) == 1
    for keys in bad.cache.keys:
        keys[bad.place] = np.nan
    with np.errstate(invalid="ignore"):
        run(batch)
    for i, (one, events) in enumerate(zip(many, told, strict=True)):
        if events[-1:] and isinstance(events[-1], Exception):
            assert i == 2
            assert isinstance(events[-1], ValueError)
            assert "NaN" in str(events[-1])
        else:
            assert events[-1].result == alone(gemma, *one)
    assert sum(isinstance(events[-1], ValueError) for events in told) == 1


def test_an_adapter_that_computes_nan_leaves_the_others_alone():
    gemma, batch = tiny_it("float64"), Batch(tiny_it("float64"))
    O, I = gemma.params["layers"][0]["attn"]["q"].shape
    nan = attach(gemma.params, [LowRank("layers.0.attn.q", np.full((1, I), np.nan), np.ones((O, 1)), 1.0)])
    one = asked(gemma)
    (bad, failed), (good, events) = request(gemma, *one, tree=nan), request(gemma, *one)
    batch.joining.extend((bad, good))
    with np.errstate(invalid="ignore"):
        run(batch)
    assert [isinstance(event, ValueError) for event in failed] == [True]
    assert events[-1].result == alone(gemma, *one)


def test_a_prompt_that_cannot_be_read_leaves_the_others_alone():
    gemma, batch = tiny_it(), Batch(tiny_it())
    (bad, failed), (good, events) = endless(gemma, max_tokens=5), endless(gemma, max_tokens=5)
    bad.row.prompt[1] = 10_000
    batch.joining.extend((bad, good))
    run(batch)
    assert [str(error).partition(" is ")[0] for error in failed] == ["token id 10000"]
    assert len(events) == 5


def test_a_pass_that_fails_is_told_to_all_its_rows_and_others_go_on(monkeypatch):
    gemma, batch = tiny_it(), Batch(tiny_it())
    rows = [endless(gemma, name) for name in (3, 5)]
    batch.joining.extend(new for new, _ in rows)
    batch.step()

    def broken(*args, **kwargs):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "forward", broken)
        batch.step()
    for _, events in rows:
        assert str(events[-1]) == "the pass in which this answer was being written failed: no room"
        assert isinstance(events[-1].__cause__, MemoryError)
    assert rows[0][1][-1] is not rows[1][1][-1]  # each is raised in a thread of its own
    assert len(batch) == 0
    later, events = endless(gemma, max_tokens=3)
    batch.joining.append(later)
    run(batch)
    assert events[-1].result.finish_reason == "length"


@pytest.mark.parametrize("kind", [RuntimeError, asyncio.CancelledError])
def test_a_callback_that_raises_cancels_its_request_alone(caplog, kind):
    gemma, batch = tiny_it(), Batch(tiny_it())
    (bad, _), (good, events) = endless(gemma, max_tokens=5), endless(gemma, max_tokens=5)
    called = []

    def broken(event):
        called.append(event)
        raise kind("nobody home")

    bad.on_event = broken
    batch.joining.extend((bad, good))
    run(batch)
    assert len(called) == 1
    assert len(events) == 5
    assert "nobody home" in caplog.text


# ---- memory


def test_an_idle_batch_keeps_nothing():
    gemma, batch = tiny_it(), Batch(tiny_it())
    new, _ = request(gemma, *asked(gemma, name="pirate"))
    batch.joining.append(new)
    batch.step()
    assert batch._params is params(gemma, "pirate")  # one tree for all rows is used as it is
    run(batch)
    assert batch._params is gemma.params
    assert not [value for value in vars(batch).values() if isinstance(value, KVCache)]
    assert batch.clear() == []
