"""Processes that take turns, round by round, and what they told."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refgemma.bench import memory, plan
from refgemma.bench.counts import BYTES
from refgemma.checkpoint.load import Progress
from refgemma.config import Config
from refgemma.errors import InputError

LONGEST = 25 * 60  # seconds in which everything is to end
_LONGEST_PROCESS = 6 * 60  # a machine without fast bfloat16 products may be at one prompt for an hour
_ROOM = 10**9  # bytes that a process takes beside its weights

_IMPORTS = {"dependencies": "numpy, safetensors, sentencepiece", "refgemma": "refgemma"}
_IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


class Job(NamedTuple):
    """A process: which engine, and for which format of weights ("" for imports)."""

    engine: str
    weights: str = ""

    @property
    def measures(self) -> int:
        """How many times it tells something, as a rule."""
        once = len(plan.DECODE) + len(plan.PREFILL) + 1
        return {"imports": 2, "refgemma": once + 10, "transformers": 2 * once + 3}[self.engine]


class Told(NamedTuple):
    """What one process told."""

    job: Job  # the process
    lines: list[dict[str, Any]]  # as `refgemma.bench.plan.say` printed them
    failure: str = ""  # why it ended before its time; empty if it did not


Round = list[Told]


def peers_installed() -> bool:
    """Whether transformers can be timed here."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def check_memory(config: Config, weights: Sequence[str]) -> None:
    """Make sure that the weights fit into memory, before they are made."""
    free = memory.available()
    for form in weights:
        needed = config.num_parameters * BYTES[form] + _ROOM
        if free is not None and needed > free:
            hint = ": --weights bfloat16 takes half" if form != "bfloat16" else ": measure a smaller --size"
            raise InputError(
                f"{form} weights of this size need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free{hint}"
            )


def run(
    folder: Path,
    *,
    weights: Sequence[str],
    peers: bool,
    rounds: int,
    longest: float = LONGEST,
    progress: Progress | None = None,
) -> list[Round]:
    """Time everything."""
    engines = ("refgemma", "transformers") if peers else ("refgemma",)
    jobs = [Job("imports"), *(Job(engine, form) for form in weights for engine in engines)]
    each = sum(job.measures for job in jobs)
    all_told: list[Round] = []
    start = time.monotonic()
    while len(all_told) < rounds:
        spent = time.monotonic() - start
        if all_told and spent * (1 + 1 / len(all_told)) > longest:
            break
        told: Round = []
        before = len(all_told) * each
        for position, job in enumerate(jobs):
            done = before + sum(earlier.measures for earlier in jobs[:position])
            left = longest - (time.monotonic() - start)

            def step(count: int, done: int = done, most: int = job.measures) -> None:
                if progress is not None:
                    progress(done + min(count, most), rounds * each)

            told.append(
                _imports() if job.engine == "imports" else _process(job, folder, min(left, _LONGEST_PROCESS), step)
            )
            step(job.measures)
        all_told.append(told)
    return all_told


def _process(job: Job, folder: Path, limit: float, step: Callable[[int], None]) -> Told:
    """Run one process to its end, or to the limit of its time."""
    if limit <= 0:
        return Told(job, [], "no time was left for it")
    _warm(folder)
    module = {"refgemma": "ours", "transformers": "peer"}[job.engine]
    command = [sys.executable, "-m", f"refgemma.bench.{module}", str(folder), job.weights]
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=_environment(), text=True)
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, stop)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdout is not None, "it was asked for"
            for line in process.stdout:
                if line.endswith("\n") and line.startswith("{"):  # not what a library prints, nor half a line
                    lines.append(json.loads(line))
                    step(len(lines))
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdout and process.stdout.close()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    if late.is_set():
        return Told(job, lines, f"stopped after {limit:.0f} seconds")
    if code == -signal.SIGKILL:
        return Told(job, lines, "killed by the system, most likely for want of memory")
    return Told(job, lines, f"ended with code {code}: {said[-1] if said else 'no word'}" if code else "")


def _warm(folder: Path) -> None:
    """Read the weights once, so that every process finds them in memory as far as there is room."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            block = bytearray(2**24)
            while file.readinto(block):
                pass


def _environment() -> dict[str, str]:
    """Ours, with this very package to be found wherever it was imported from."""
    package = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}


def _imports(times: int = 3) -> Told:
    """Time importing refgemma, and importing its dependencies, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in _IMPORTS}
    with tempfile.TemporaryDirectory() as compiled:  # whatever the environment says: importing is not compiling
        environment = _environment() | {"PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
        for turn in range(times + 1):
            for name, modules in _IMPORTS.items():
                command = [sys.executable, "-c", _IMPORT.format(modules)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                if turn:  # the first finds files cold, and compiles
                    seconds[name].append(float(done.stdout))
    lines = [{"measure": name, "seconds": [statistics.median(each)]} for name, each in seconds.items()]
    return Told(Job("imports"), lines)
