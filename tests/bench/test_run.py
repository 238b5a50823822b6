"""Processes in turn: what they tell, and how one that fails is told of."""

import shutil
import sys

import numpy as np
import pytest

from refgemma.bench import memory, plan, run
from refgemma.bench.run import Job, check_memory
from refgemma.config import SIZES


def test_every_process_tells_every_measure(whole_run):
    told = {job: lines for job, lines, failure in whole_run.rounds[0] if not failure}
    assert list(told) == [Job("imports"), Job("refgemma", "float32"), Job("refgemma", "bfloat16")]
    names = {job: [line["measure"] for line in lines] for job, lines in told.items()}
    assert names[Job("imports")] == ["dependencies", "refgemma"]
    ours = ["about", "load", "first_token", "prefill_128", *plan.DECODE, "prefill_2048", "memory", "memory_long"]
    beside = [*(f"beside.{what}" for what in ("decode", "decode_8_rows", "products")), "stream", "beside.prefill"]
    assert names[Job("refgemma", "bfloat16")] == [*ours, *beside, "gemm"]
    assert names[Job("refgemma", "float32")] == [*ours, *beside, "gemm", "fresh"]
    assert all(second > 0 for lines in told.values() for line in lines for second in line.get("seconds", []))


def test_memory_grows_and_is_told_in_bytes(whole_run):
    lines = whole_run.rounds[0][1].lines
    before, after = ({key: line[key] for key in ("rss", "rss_anon")} for line in lines if "memory" in line["measure"])
    if memory.total() is None:
        pytest.skip("the system does not tell")
    for key in ("rss", "rss_anon"):
        assert 10**7 < before[key] <= after[key] < memory.total()  # an interpreter with NumPy takes tens of megabytes


def test_progress_comes_to_its_end(whole_run):
    seen = whole_run.seen
    done = [at for at, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {seen[-1][0]}


def test_a_process_that_fails_is_told_of(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"")
    told = run._process(Job("refgemma", "float32"), broken, 60, lambda count: None)
    assert [line["measure"] for line in told.lines] == ["about"]
    assert told.failure.startswith("ended with code 1: refgemma.errors.InputError: ")
    assert "is empty" in told.failure


def test_a_process_that_takes_too_long_is_stopped(folder):
    told = run._process(Job("refgemma", "float32"), folder, 0.01, lambda count: None)
    assert told.failure == "stopped after 0 seconds"
    assert run._process(Job("refgemma", "float32"), folder, 0, lambda count: None).failure == "no time was left for it"


def test_what_was_told_before_the_end_stands(folder, monkeypatch):
    said = 'a word\n{"measure": "load", "seconds": [1]}\n{"meas'
    script = f"print({said!r}, end=''); raise SystemExit(3)"
    start = run.subprocess.Popen
    monkeypatch.setattr(
        run.subprocess, "Popen", lambda command, **options: start([sys.executable, "-c", script], **options)
    )
    told = run._process(Job("refgemma", "float32"), folder, 60, lambda count: None)
    assert told == (Job("refgemma", "float32"), [{"measure": "load", "seconds": [1]}], "ended with code 3: no word")


def test_no_round_is_begun_that_would_end_too_late(folder, monkeypatch):
    clock = iter([0.0, *(100.0 * i for i in range(99))])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(run, "_process", lambda job, *_: run.Told(job, []))
    monkeypatch.setattr(run, "_imports", lambda: run.Told(Job("imports"), []))
    jobs = 2  # of a round: imports, ours; each looks at the clock once, and a round once before it begins
    assert len(run.run(folder, weights=("float32",), peers=False, rounds=9, longest=100.0 * (2 * (jobs + 1)))) == 2


def test_weights_that_do_not_fit_into_memory(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 24 * 10**9)
    check_memory(SIZES["gemma-7b"], ("bfloat16",))  # 17.1 GB
    with pytest.raises(ValueError, match=r"^float32 weights of this size need 35\.2 GB of memory, 24\.0 GB are free: "):
        check_memory(SIZES["gemma-7b"], ("bfloat16", "float32"))
    monkeypatch.setattr(memory, "available", lambda: None)
    check_memory(SIZES["gemma-7b"], ("float32",))


def test_timings_are_as_many_as_asked_for():
    calls = []
    assert len(plan.timings(lambda: calls.append(0), least=3, most=7)) == len(calls) == 7
    assert len(plan.timings(lambda: None, least=3, most=7, enough=0)) == 3


def test_works_take_turns_and_what_is_cold_does_not_count(monkeypatch):
    clock, calls = [0.0], [""]
    monkeypatch.setattr(plan.time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        def call():
            clock[0] += seconds if calls[-1] == name else 1000.0
            calls.append(name)

        return call

    assert plan.in_turn(work("a", 1.0), work("b", 2.0)) == [1.0, 2.0]
    assert calls[1:] == ["a", "a", "b", "b"] * 5  # once in vain, and as many turns as must be: 6 s are over
    calls[1:] = ["a"]
    assert plan.in_turn(work("a", 0.01)) == [pytest.approx(0.01)]
    assert len(calls) - 2 == 16 * 3 <= plan.MOST_STEPS - 1  # short work is done in vain twice; a cache has room for it


def test_a_prompt_is_the_same_each_time_and_in_the_vocabulary(config):
    tokens = plan.prompt(config, 500)
    assert tokens.shape == (1, 500)
    assert np.array_equal(tokens, plan.prompt(config, 500))
    assert tokens.min() >= 3
    assert tokens.max() < config.vocab_size
