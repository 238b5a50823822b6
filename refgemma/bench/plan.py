"""The work that every engine is timed at, and how a process tells what it measured: lines of JSON.

An engine is two functions: one reads a prompt, the other makes a decoder with a cache that is filled already.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refgemma.config import Config

SHORT, LONG = 128, 2048  # tokens of a prompt
NEAR, FAR = 128, 4096  # positions in the cache
ROWS = 8  # of a batch
FIRST = 8  # tokens of the prompt whose first answer is waited for
MOST_STEPS = 50  # of one decoder, the first included: a cache needs room for them

_ENOUGH = 2.0  # seconds spent on one measure, once it was repeated as often as it must be
_TURNS = (5, 16)  # of several measures that take turns, at least and at most; three steps of a decoder in each
_ENOUGH_TURNS = 6.0  # seconds spent on them
_WARM = 0.05  # seconds for which each is done in vain first, but no more than twice


class Engine(NamedTuple):
    """A loaded model."""

    # ``prefill(tokens)`` reads one prompt, (1, T), into a new cache, and computes the logits of its last position
    prefill: Callable[[Any], object]
    # ``decoder(context, rows)`` fills a new cache at random; its result feeds each row one more token when called, and
    # decides the next
    decoder: Callable[[int, int], Callable[[], object]]


class Decoding(NamedTuple):
    """One kind of step: positions in the cache, rows of the batch."""

    context: int
    rows: int


DECODE = {"decode_128": Decoding(NEAR, 1), "decode_8_rows": Decoding(NEAR, ROWS), "decode_4096": Decoding(FAR, 1)}
PREFILL = {"prefill_128": SHORT, "prefill_2048": LONG}


def say(measure: str, **what: object) -> None:
    """Print a line of JSON."""
    print(json.dumps({"measure": measure, **what}), flush=True)


def prompt(config: Config, count: int) -> Any:
    """Draw a prompt."""
    return np.random.default_rng(1).integers(3, config.vocab_size, (1, count))


def touch_memory(nbytes: int) -> None:
    """Let another process fill memory and give it back, so that loading does not wait for a virtual machine's host.

    A host takes back what its guest has not used for some seconds, and finds it anew page by page, several times slower
    than the guest fills it. On a machine of its own this changes nothing.
    """
    subprocess.run([sys.executable, "-c", f"import numpy; numpy.ones({nbytes}, numpy.uint8)"], check=False)


def begin(load: Callable[[], Engine], config: Config) -> Engine:
    """Time the loading, and from its start the first token of a short prompt."""
    tokens = prompt(config, FIRST)
    start = time.perf_counter()
    engine = load()
    say("load", seconds=[time.perf_counter() - start])
    engine.prefill(tokens)
    say("first_token", seconds=[time.perf_counter() - start])
    return engine


def carry_out(engine: Engine, config: Config, peaks: Callable[[], dict[str, int | None]], variant: str = "") -> None:
    """Time reading and writing, the dearest last: a process that takes too long is stopped, and what it told stands."""

    def read(name: str, *, least: int, most: int) -> None:
        tokens = prompt(config, PREFILL[name])
        say(name, variant=variant, seconds=timings(lambda: engine.prefill(tokens), least=least, most=most))

    engine.prefill(prompt(config, SHORT))  # once in vain: the first time finds memory and threads cold
    read("prefill_128", least=2, most=20)
    for name, (context, rows) in DECODE.items():
        step = engine.decoder(context, rows)
        step()
        say(name, variant=variant, seconds=timings(step, least=3, most=MOST_STEPS - 1))
        del step  # and its cache
    read("prefill_2048", least=1, most=3)
    say("memory", variant=variant, **peaks())


def timings(work: Callable[[], object], *, least: int, most: int, enough: float = _ENOUGH) -> list[float]:
    """Time some work again and again."""
    seconds: list[float] = []
    while len(seconds) < least or (len(seconds) < most and sum(seconds) < enough):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def in_turn(*works: Callable[[], object]) -> list[float]:
    """Time several pieces of work in turn, so that a machine that is fast at one moment is so for all of them."""
    turns: list[list[float]] = []
    start = time.perf_counter()
    while len(turns) < _TURNS[0] or (len(turns) < _TURNS[1] and time.perf_counter() - start < _ENOUGH_TURNS):
        turns.append([_warm(work) for work in works])
    return [statistics.median(seconds) for seconds in zip(*turns, strict=True)]


def _warm(work: Callable[[], object]) -> float:
    """Seconds of some work that was done in vain for a while before.

    The first time finds memory and threads cold, and the threads of what came before may still be awake: those of BLAS
    wait for more work without a pause.
    """
    timings(work, least=1, most=2, enough=_WARM)
    return timings(work, least=1, most=1)[0]
