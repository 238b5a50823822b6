"""A checkpoint of random weights, and the processes that take turns to time it, round by round."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refgemma.bench import engines, machine
from refgemma.bench.counts import BYTES
from refgemma.checkpoint.folder import Outgoing, split_into_files, total_bytes, write_weights
from refgemma.checkpoint.load import Progress
from refgemma.checkpoint.names import Tensor, tensors_of
from refgemma.config import SIZES, Config, read_config
from refgemma.errors import InputError
from refgemma.files.atomic import check_folder_place, check_room, whole_folder
from refgemma.numerics import Array, to_bfloat16

# Every size that can be measured; "tiny" has the shape of the shipped model.
SHAPES: dict[str, Config] = {
    **SIZES,
    "tiny": Config.uniform(
        vocab_size=1000,
        hidden_size=184,
        intermediate_size=512,
        num_layers=6,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        max_positions=8192,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        query_scale=32**-0.5,
        tie_word_embeddings=True,
    ),
}
LONGEST = 25 * 60  # seconds for everything
_LONGEST_PROCESS = 6 * 60  # without fast bfloat16 products one prompt may take an hour
_ROOM = 10**9  # bytes that a process takes beside its weights
_PIECE = 2**24  # random numbers drawn at once, 64 MiB
_SHARD = 5 * 10**9  # bytes per file, as in published checkpoints


class Job(NamedTuple):
    """A process: an engine, and the format of its weights."""

    engine: str
    weights: str

    @property
    def measures(self) -> int:
        """How many lines it usually prints."""
        once = len(engines.DECODE) + len(engines.PREFILL) + 1
        return {"refgemma": once + 10, "transformers": 2 * once + 3}[self.engine]


class Outcome(NamedTuple):
    """What one process printed, and why it ended early, if it did."""

    job: Job
    lines: list[dict[str, Any]]
    failure: str = ""


Round = list[Outcome]


def peers_installed() -> bool:
    """Whether transformers can be timed here."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def check_memory(config: Config, weights: Sequence[str]) -> None:
    """Refuse weights that do not fit into memory, before they are made."""
    free = machine.available_memory()
    for form in weights:
        needed = config.num_parameters * BYTES[form] + _ROOM
        if free is not None and needed > free:
            hint = ": --weights bfloat16 takes half" if form != "bfloat16" else ": measure a smaller --size"
            raise InputError(
                f"{form} weights of this size need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free{hint}"
            )


@contextmanager
def checkpoint(size: str, keep: str | Path | None = None, progress: Progress | None = None) -> Iterator[Path]:
    """Provide a folder of random weights: a temporary one, or one below `keep` that is found again next time."""
    config = SHAPES[size]
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="refgemma-bench-") as temporary:
            yield make(Path(temporary) / size, config, progress)
        return
    folder = Path(keep).expanduser() / size
    if not folder.exists():
        make(folder, config, progress)
    elif read_config(folder) != config:
        raise InputError(f"{folder} holds a model of another shape: expected {size}; remove it, or keep elsewhere")
    yield folder


def make(folder: Path, config: Config, progress: Progress | None = None) -> Path:
    """Write a checkpoint in Hugging Face layout, piece by piece, whole or not at all.

    The random bfloat16 weights have the deviation that keeps activations near one, as in a trained model. Products take
    as long with any numbers except subnormal ones.
    """
    rng = np.random.default_rng(0)
    files = split_into_files(
        (
            Outgoing(name=tensor.name, form="bfloat16", shape=tensor.shape, blocks=_random(tensor, rng))
            for tensor in tensors_of(config)
        ),
        _SHARD,
    )
    check_folder_place(folder)
    check_room(folder, total_bytes(files))
    with whole_folder(folder) as unfinished:
        write_weights(unfinished, files, progress)
        (unfinished / "config.json").write_text(json.dumps(_hf_fields(config), indent=2) + "\n", encoding="utf-8")
    return folder


def _random(tensor: Tensor, rng: np.random.Generator) -> Callable[[], Iterator[Array]]:
    shape = tensor.shape
    deviation = np.float32(shape[1] ** -0.5 if len(shape) == 2 else 0.1)  # norm weights are offsets from one

    def blocks() -> Iterator[Array]:
        left = int(np.prod(shape))
        while left:
            count = min(left, _PIECE)
            yield to_bfloat16(rng.standard_normal(count, np.float32) * deviation)
            left -= count

    return blocks


def _hf_fields(config: Config) -> dict[str, object]:
    """What both engines read in ``config.json``."""
    row = config.layers[0]  # all layers of a Gemma 1 are alike
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": row.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": row.num_heads,
        "num_key_value_heads": row.num_kv_heads,
        "head_dim": row.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": row.rope_theta},
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


def run(
    folder: Path,
    *,
    weights: Sequence[str],
    peers: bool,
    rounds: int,
    longest: float = LONGEST,
    progress: Progress | None = None,
) -> list[Round]:
    """Run every process, in turn, until the rounds are done or another would take too long."""
    names = ("refgemma", "transformers") if peers else ("refgemma",)
    jobs = [Job(engine, form) for form in weights for engine in names]
    total = rounds * sum(job.measures for job in jobs)
    finished: list[Round] = []
    done, start = 0, time.monotonic()
    while len(finished) < rounds:
        spent = time.monotonic() - start
        if finished and spent * (1 + 1 / len(finished)) > longest:
            break
        outcomes: Round = []
        for job in jobs:

            def step(count: int, done: int = done, most: int = job.measures) -> None:
                if progress is not None:
                    progress(done + min(count, most), total)

            left = longest - (time.monotonic() - start)
            outcomes.append(_process(job, folder, min(left, _LONGEST_PROCESS), step))
            step(job.measures)
            done += job.measures
        finished.append(outcomes)
    return finished


def _process(job: Job, folder: Path, limit: float, step: Callable[[int], None]) -> Outcome:
    """Run one process to its end, or until its time is up."""
    if limit <= 0:
        return Outcome(job, [], "no time was left for it")
    _warm(folder)
    command = [sys.executable, "-m", "refgemma.bench.engines", job.engine, str(folder), job.weights]
    package = str(Path(__file__).resolve().parents[2])  # wherever it was imported from
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=os.environ | {"PYTHONPATH": path}, text=True
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, stop)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.endswith("\n") and line.startswith("{"):  # not output of a library, nor half a line
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
        return Outcome(job, lines, f"stopped after {limit:.0f} seconds")
    if code == -signal.SIGKILL:
        return Outcome(job, lines, "killed by the system, most likely for lack of memory")
    return Outcome(job, lines, f"ended with code {code}: {said[-1] if said else 'no message'}" if code else "")


def _warm(folder: Path) -> None:
    """Read the weights once, so that every process finds them in memory, as far as they fit."""
    block = bytearray(2**24)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
