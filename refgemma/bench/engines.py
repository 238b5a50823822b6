"""The work that every engine is timed at, and the process that does it: ``python -m refgemma.bench.engines ...``.

Arguments are an engine, refgemma or transformers, a folder, and the format of its weights; a line of JSON is printed
for each measure. transformers runs at its fastest: inference mode, all cores, logits of the last position only, and
both attentions that run on every processor, of which the better counts.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from refgemma import generation
from refgemma.bench import limits
from refgemma.bench.counts import BYTES
from refgemma.bench.machine import watched_memory
from refgemma.cache import KVCache
from refgemma.checkpoint.load import load_params
from refgemma.compute.products import times_transposed
from refgemma.compute.threads import threads
from refgemma.config import Config, read_config
from refgemma.model import forward
from refgemma.numerics import FLOAT32, Array, Bfloat16Matrix
from refgemma.params import Params

Matrix: TypeAlias = Array | Bfloat16Matrix

FIRST = 8  # tokens of the prompt whose first answer is timed from the start of loading
ROWS = 8  # of a batch
PREFILL = {"prefill_128": 128, "prefill_2048": 2048}  # tokens
DECODE = {"decode_128": (128, 1), "decode_8_rows": (128, ROWS), "decode_4096": (4096, 1)}  # cached positions, rows
ATTENTIONS = ("sdpa", "eager")  # of transformers; the thriftier first, since memory is a peak


class Engine(NamedTuple):
    """A loaded model."""

    # ``prefill(tokens)``, tokens (1, T): read a prompt into a new cache, compute the logits of its last position
    prefill: Callable[[Any], object]
    # ``decoder(context, rows)``: fill a cache at random, return a function that feeds each row one more token
    decoder: Callable[[int, int], Callable[[], object]]


def say(measure: str, **what: object) -> None:
    """Print a line of JSON."""
    print(json.dumps({"measure": measure, **what}), flush=True)


def prompt(config: Config, count: int) -> Any:
    """Random tokens, (1, T), the same each time."""
    return np.random.default_rng(1).integers(3, config.vocab_size, (1, count))


def _load(load: Callable[[], Engine], config: Config, weights: str) -> Engine:
    """Time loading, and from its start the first token of a short prompt.

    First, another process fills as much memory and gives it back: the host of a virtual machine takes back what its
    guest has not used for some seconds, and returns it several times slower than the guest fills it.
    """
    if weights == "float32":  # bfloat16 stays in its file
        nbytes = BYTES[weights] * config.num_parameters
        subprocess.run([sys.executable, "-c", f"import numpy; numpy.ones({nbytes}, numpy.uint8)"], check=False)
    tokens = prompt(config, FIRST)
    start = time.perf_counter()
    engine = load()
    say("load", seconds=[time.perf_counter() - start])
    engine.prefill(tokens)
    say("first_token", seconds=[time.perf_counter() - start])
    return engine


def _measure(engine: Engine, config: Config, peaks: Callable[[], dict[str, int | None]], variant: str = "") -> None:
    """Time reading and writing, the slowest last: a process that takes too long is stopped, what it printed counts."""

    def read(name: str, *, least: int, most: int) -> None:
        tokens = prompt(config, PREFILL[name])
        say(name, variant=variant, seconds=limits.timings(lambda: engine.prefill(tokens), least=least, most=most))

    engine.prefill(prompt(config, PREFILL["prefill_128"]))  # untimed: memory and threads are cold
    read("prefill_128", least=2, most=20)
    for name, (context, rows) in DECODE.items():
        step = engine.decoder(context, rows)
        step()
        say(name, variant=variant, seconds=limits.timings(step, least=3, most=limits.MOST_STEPS - 1))
        del step  # and its cache
    read("prefill_2048", least=1, most=3)
    say("memory", variant=variant, **peaks())


def time_refgemma(folder: Path, weights: str) -> None:
    """Time refgemma, then take turns with the limits of the machine."""
    config = read_config(folder)
    loaded: list[Params] = []

    def load() -> Engine:
        params = load_params(folder, config, weights=weights)
        loaded.append(params)
        return Engine(
            prefill=lambda tokens: generation.read_prompts(
                params,
                config,
                tokens.tolist(),
                KVCache(config, batch=1, capacity=tokens.shape[1]),
                [],
                numerics=FLOAT32,
            ),
            decoder=lambda context, rows: _decoder(params, config, context, rows),
        )

    say("about", threads=threads(), blas=limits.blas_name())
    with watched_memory() as peaks:
        engine = _load(load, config, weights)
        _measure(engine, config, peaks)
        # Only the end of a prompt that fills the context: memory peaks there, and reading all of it takes long.
        cache = _filled(config, config.max_positions - generation.CHUNK, 1, room=generation.CHUNK)
        forward(loaded[0], config, prompt(config, generation.CHUNK), cache=cache, logits="last")
        say("memory_long", **peaks())
        del cache
    groups = _groups(loaded[0])
    _beside_memory(engine, groups)
    _beside_arithmetic(engine, groups[2][0], prompt(config, PREFILL["prefill_128"]))
    if weights == "float32":
        size = min(limits.FRESH, BYTES[weights] * config.num_parameters)
        say("fresh", rate=size / median(limits.timings(lambda: limits.fill(size), least=3, most=5)))


def _decoder(params: Params, config: Config, context: int, rows: int) -> Callable[[], object]:
    cache = _filled(config, context, rows, room=limits.MOST_STEPS)
    tokens = np.repeat(prompt(config, 1), rows, axis=0)

    def step() -> None:
        nonlocal tokens
        scores = forward(params, config, tokens, cache=cache, logits="last")
        tokens = scores.argmax(axis=-1, keepdims=True)

    return step


def _filled(config: Config, context: int, rows: int, *, room: int) -> KVCache:
    """Cache of random keys and values, with room for more."""
    cache = KVCache(config, batch=rows, capacity=context + room)
    rng = np.random.default_rng(2)
    for pair in zip(cache.keys, cache.values, strict=True):
        for array in pair:
            some = array[:, :, :context]
            some[...] = rng.standard_normal(some.shape, np.float32)
    cache.extend(np.tile(np.arange(context), (rows, 1)))
    return cache


def _groups(params: Params) -> list[list[Matrix]]:
    """All matrices that a token is multiplied with, grouped as in `forward`; the head last."""
    together = [("attn", "q", "k", "v"), ("attn", "out"), ("mlp", "gate", "up"), ("mlp", "down")]
    layers = cast(list[dict[str, dict[str, Matrix]]], params["layers"])
    groups = [[layer[block][name] for name in names] for layer in layers for block, *names in together]
    return [*groups, [cast(Matrix, params["head"])]]


def _beside_memory(engine: Engine, groups: list[list[Matrix]]) -> None:
    """A step, its matrix products alone, and memory read as fast as possible: by gemv, or a bare tile loop."""
    rng = np.random.default_rng(3)
    x = {width: rng.standard_normal((1, width), np.float32) for width in {ws[0].shape[1] for ws in groups}}

    def inside() -> None:
        for ws in groups:
            times_transposed(x[ws[0].shape[1]], ws)

    narrow = [w.bits for ws in groups for w in ws if isinstance(w, Bfloat16Matrix)]
    head = groups[-1][0]
    bare: list[Callable[[], Any]] = [
        *(limits.tile_loops(narrow) if isinstance(head, Bfloat16Matrix) else limits.products(head, x[head.shape[1]][0]))
    ]
    context = DECODE["decode_128"][0]
    step, of_rows, alone, *streams = limits.in_turn(
        engine.decoder(context, 1), engine.decoder(context, ROWS), inside, *bare
    )
    say("beside.decode", seconds=[step])
    say("beside.decode_8_rows", seconds=[of_rows])
    say("beside.products", seconds=[alone])
    say("stream", rate=(sum(bits.nbytes for bits in narrow) or head.nbytes) / min(streams))


def _beside_arithmetic(engine: Engine, w: Matrix, tokens: Array) -> None:
    """A prompt, and arithmetic as fast as possible: gemm."""
    rng, count = np.random.default_rng(3), tokens.shape[1]
    wide = w.rows(slice(None), FLOAT32.dtype) if isinstance(w, Bfloat16Matrix) else w
    many = [rng.standard_normal((w.shape[1], columns), np.float32) for columns in (count, 4 * count)]
    ways = [(way, 2 * w.shape[0] * x.size) for x in many for way in limits.products(wide, x)]
    seconds, *found = limits.in_turn(lambda: engine.prefill(tokens), *(way for way, _ in ways))
    say("beside.prefill", seconds=[seconds])
    say("gemm", rate=max(work / taken for (_, work), taken in zip(ways, found, strict=True)))


def time_transformers(folder: Path, weights: str) -> None:
    """Time transformers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = read_config(folder)
    engine_class = transformers.GemmaForCausalLM  # imported here, so that loading does not include it
    loaded: list[Any] = []

    def load() -> Engine:
        model = engine_class.from_pretrained(
            folder, dtype=getattr(torch, weights), attn_implementation=ATTENTIONS[0]
        ).eval()
        loaded.append(model)
        return Engine(
            prefill=lambda tokens: model(torch.from_numpy(tokens), use_cache=True, logits_to_keep=1),
            decoder=lambda context, rows: _decoder_of_transformers(model, config, context, rows),
        )

    say("about", threads=torch.get_num_threads())
    with torch.inference_mode(), watched_memory() as peaks:
        engine = _load(load, config, weights)
        for attention in ATTENTIONS:
            loaded[0].set_attn_implementation(attention)
            _measure(engine, config, peaks, attention)


def _decoder_of_transformers(model: Any, config: Config, context: int, rows: int) -> Callable[[], object]:
    torch = importlib.import_module("torch")
    cache = importlib.import_module("transformers").DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(2)
    for layer, c in enumerate(config.layers):
        shape = (rows, c.num_kv_heads, context, c.head_dim)
        keys, values = (torch.randn(shape, generator=generator).to(model.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    tokens = torch.from_numpy(prompt(config, 1)).repeat(rows, 1)
    # transformers 5.24 renamed the argument
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def step() -> None:
        nonlocal tokens
        out = model(tokens, use_cache=True, logits_to_keep=1, **{name: cache})
        tokens = out.logits[:, -1].argmax(-1, keepdim=True)

    return step


if __name__ == "__main__":
    {"refgemma": time_refgemma, "transformers": time_transformers}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
