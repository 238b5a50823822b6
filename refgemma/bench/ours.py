"""The process that times refgemma: ``python -m refgemma.bench.ours FOLDER WEIGHTS``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from refgemma import generation
from refgemma.bench import beside, limits, memory, plan
from refgemma.bench.counts import BYTES
from refgemma.cache import KVCache
from refgemma.checkpoint.load import load_params
from refgemma.compute.threads import threads
from refgemma.config import Config, read_config
from refgemma.model import Params, forward
from refgemma.numerics import FLOAT32, Array


def main(folder: Path, weights: str) -> None:
    """Time one format of weights."""
    config = read_config(folder)
    loaded: list[Params] = []

    def load() -> plan.Engine:
        params = load_params(folder, config, weights=weights)
        loaded.append(params)
        return plan.Engine(
            prefill=lambda tokens: _read(params, config, tokens),
            decoder=lambda context, rows: _decoder(params, config, context, rows),
        )

    plan.say("about", threads=threads(), blas=limits.blas_name())
    if weights == "float32":  # of bfloat16 nothing is filled
        plan.touch_memory(BYTES[weights] * config.num_parameters)
    with memory.watched() as peaks:
        engine = plan.begin(load, config)
        plan.carry_out(engine, config, peaks)
        # Only the end of a prompt that fills the context is read: memory is at its height there, and time is saved.
        cache = _filled(config, config.max_positions - generation.CHUNK, 1, room=generation.CHUNK)
        tokens = plan.prompt(config, generation.CHUNK)
        forward(loaded[0], config, tokens, cache=cache, logits="last")
        plan.say("memory_long", **peaks())
    beside.limits(engine, loaded[0], config)
    if weights == "float32":
        size = min(limits.FRESH, BYTES[weights] * config.num_parameters)
        plan.say("fresh", rate=size / median(plan.timings(lambda: limits.fill(size), least=3, most=5)))


def _read(params: Params, config: Config, tokens: Array) -> Array:
    """Read a prompt as generation does, in chunks."""
    cache = KVCache(config, batch=1, capacity=tokens.shape[1])
    return generation.read_prompts(params, config, tokens.tolist(), cache, [], numerics=FLOAT32)


def _decoder(params: Params, config: Config, context: int, rows: int) -> Callable[[], object]:
    cache = _filled(config, context, rows, room=plan.MOST_STEPS)
    tokens = np.repeat(plan.prompt(config, 1), rows, axis=0)

    def step() -> None:
        nonlocal tokens
        scores = forward(params, config, tokens, cache=cache, logits="last")
        tokens = scores.argmax(axis=-1, keepdims=True)

    return step


def _filled(config: Config, context: int, rows: int, *, room: int) -> KVCache:
    """Cache that holds random keys and values, and has room for some more."""
    cache = KVCache(config, batch=rows, capacity=context + room)
    rng = np.random.default_rng(2)
    for layer in range(config.num_layers):
        for array in (cache.keys, cache.values):
            some = array[layer, :, :, :context]
            some[...] = rng.standard_normal(some.shape, np.float32)
    cache.extend(np.tile(np.arange(context), (rows, 1)))
    return cache


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
