"""Processes in turn: what they print, and how a failure is reported."""

import shutil
import sys

import numpy as np
import pytest

from refgemma.bench import engines, limits, machine, run
from refgemma.bench.run import Job, check_memory
from refgemma.config import SIZES


def test_every_process_prints_every_measure(whole_run):
    printed = {job: lines for job, lines, failure in whole_run.rounds[0] if not failure}
    assert list(printed) == [Job("refgemma", "float32"), Job("refgemma", "bfloat16")]
    names = {job: [line["measure"] for line in lines] for job, lines in printed.items()}
    own = ["about", "load", "first_token", "prefill_128", *engines.DECODE, "prefill_2048", "memory", "memory_long"]
    beside = [*(f"beside.{what}" for what in ("decode", "decode_8_rows", "products")), "stream", "beside.prefill"]
    assert names[Job("refgemma", "bfloat16")] == [*own, *beside, "gemm"]
    assert names[Job("refgemma", "float32")] == [*own, *beside, "gemm", "fresh"]
    assert all(second > 0 for lines in printed.values() for line in lines for second in line.get("seconds", []))


def test_memory_grows_and_is_in_bytes(whole_run):
    lines = whole_run.rounds[0][0].lines
    before, after = ({key: line[key] for key in ("rss", "rss_anon")} for line in lines if "memory" in line["measure"])
    if machine.total_memory() is None:
        pytest.skip("the system does not tell")
    for key in ("rss", "rss_anon"):
        assert (
            10**7 < before[key] <= after[key] < machine.total_memory()
        )  # an interpreter with NumPy takes tens of megabytes


def test_progress_comes_to_its_end(whole_run):
    seen = whole_run.seen
    done = [at for at, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {seen[-1][0]}


def test_a_failure_is_reported(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"")
    outcome = run._process(Job("refgemma", "float32"), broken, 60, lambda count: None)
    assert [line["measure"] for line in outcome.lines] == ["about"]
    assert outcome.failure.startswith("ended with code 1: refgemma.errors.InputError: ")
    assert "is empty" in outcome.failure


def test_a_process_that_takes_too_long_is_stopped(folder):
    outcome = run._process(Job("refgemma", "float32"), folder, 0.01, lambda count: None)
    assert outcome.failure == "stopped after 0 seconds"
    assert run._process(Job("refgemma", "float32"), folder, 0, lambda count: None).failure == "no time was left for it"


def test_lines_printed_before_the_end_count(folder, monkeypatch):
    said = 'a word\n{"measure": "load", "seconds": [1]}\n{"meas'
    script = f"print({said!r}, end=''); raise SystemExit(3)"
    start = run.subprocess.Popen
    monkeypatch.setattr(
        run.subprocess, "Popen", lambda command, **options: start([sys.executable, "-c", script], **options)
    )
    outcome = run._process(Job("refgemma", "float32"), folder, 60, lambda count: None)
    assert outcome == (
        Job("refgemma", "float32"),
        [{"measure": "load", "seconds": [1]}],
        "ended with code 3: no message",
    )


def test_no_round_is_begun_that_would_end_too_late(folder, monkeypatch):
    clock = iter([0.0, *(100.0 * i for i in range(99))])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(run, "_process", lambda job, *_: run.Outcome(job, []))
    jobs = 1  # per round: refgemma; each looks at the clock once, and a round once before it begins
    assert len(run.run(folder, weights=("float32",), peers=False, rounds=9, longest=100.0 * (2 * (jobs + 1)))) == 2


def test_weights_that_do_not_fit_into_memory(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 24 * 10**9)
    check_memory(SIZES["gemma-7b"], ("bfloat16",))  # 17.1 GB
    with pytest.raises(ValueError, match=r"^float32 weights of this size need 35\.2 GB of memory, 24\.0 GB are free: "):
        check_memory(SIZES["gemma-7b"], ("bfloat16", "float32"))
    monkeypatch.setattr(machine, "available_memory", lambda: None)
    check_memory(SIZES["gemma-7b"], ("float32",))


def test_timings_are_as_many_as_asked_for():
    calls = []
    assert len(limits.timings(lambda: calls.append(0), least=3, most=7)) == len(calls) == 7
    assert len(limits.timings(lambda: None, least=3, most=7, enough=0)) == 3


def test_works_take_turns_and_what_is_cold_does_not_count(monkeypatch):
    clock, calls = [0.0], [""]
    monkeypatch.setattr(limits.time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        def call():
            clock[0] += seconds if calls[-1] == name else 1000.0
            calls.append(name)

        return call

    assert limits.in_turn(work("a", 1.0), work("b", 2.0)) == [1.0, 2.0]
    assert calls[1:] == ["a", "a", "b", "b"] * 5  # once in vain, and as many turns as must be: 6 s are over
    calls[1:] = ["a"]
    assert limits.in_turn(work("a", 0.01)) == [pytest.approx(0.01)]
    assert (
        len(calls) - 2 == 16 * 3 <= limits.MOST_STEPS - 1
    )  # short work is done in vain twice; a cache has room for it


def test_a_prompt_is_the_same_each_time_and_in_the_vocabulary(config):
    tokens = engines.prompt(config, 500)
    assert tokens.shape == (1, 500)
    assert np.array_equal(tokens, engines.prompt(config, 500))
    assert tokens.min() >= 3
    assert tokens.max() < config.vocab_size
