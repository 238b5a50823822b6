"""What a decision costs, as a share of the decode step that it follows.

A model of gemma-2b's shape with weights that mean nothing decodes token by token (10 GB, a minute); after each step one
decision is timed, on logits of a given kind, so caches are as cold as they are in a real run. Run by hand, on a machine
that does nothing else::

    OPENBLAS_NUM_THREADS=4 python -m tests.sampling.cost [repeats]
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from refgemma.cache import KVCache
from refgemma.config import SIZES
from refgemma.model import forward
from refgemma.numerics import FLOAT32
from refgemma.sampling import SamplingParams, decide, record_logits

PROMPT, OUTPUT = list(range(1000, 1300)), list(range(2000, 2100))
KINDS = {
    "temperature": ("peaked", {}),
    "top_k 50": ("peaked", {"top_k": 50}),
    "top_p 0.9": ("peaked", {"top_p": 0.9}),
    "top_k 50, top_p 0.9": ("peaked", {"top_k": 50, "top_p": 0.9}),
    "top_p 0.9, flat": ("flat", {"top_p": 0.9}),
    "min_p 0.05": ("peaked", {"min_p": 0.05}),
    "typical 0.9": ("peaked", {"typical_p": 0.9}),
    "typical 0.9, flat": ("flat", {"typical_p": 0.9}),
    "all penalties": (
        "peaked",
        {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1},
    ),
    "greedy": ("peaked", {"temperature": 0.0}),
}


def weights(rng, *shape):
    """Numbers of the right size, the same few million over and over."""
    some = rng.standard_normal(2**20, dtype=np.float32) * np.float32(shape[-1] ** -0.5)
    return np.resize(some, shape)


def model(config):
    """Parameters of this shape."""
    rng = np.random.default_rng(1)
    D, F, V = config.hidden_size, config.layers[0].intermediate_size, config.vocab_size
    heads, kv = (
        config.layers[0].num_heads * config.layers[0].head_dim,
        config.layers[0].num_kv_heads * config.layers[0].head_dim,
    )
    embed = weights(rng, V, D)
    zeros = np.zeros(D, np.float32)
    layers = [
        {
            "attn": {
                "norm": zeros,
                "q": weights(rng, heads, D),
                "k": weights(rng, kv, D),
                "v": weights(rng, kv, D),
                "out": weights(rng, D, heads),
            },
            "mlp": {
                "norm": zeros,
                "gate": weights(rng, F, D),
                "up": weights(rng, F, D),
                "down": weights(rng, D, F),
            },
        }
        for _ in range(config.num_layers)
    ]
    return {"embed": embed, "layers": layers, "final_norm": zeros, "head": embed}


def logits_of(kind, V):
    """Flat, or as a trained model's: a few likely tokens and a long tail."""
    rng = np.random.default_rng(2)
    noise = rng.standard_normal(V)
    if kind == "flat":
        return (1e-3 * noise).astype(np.float32)
    return rng.permutation(20 - 2.2 * np.log(np.arange(1, V + 1)) + 0.3 * noise).astype(np.float32)


def main():
    """Print a table."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    config = SIZES["gemma-2b"]
    V = config.vocab_size
    params = model(config)
    cache = KVCache(config, batch=1, capacity=4096, dtype=FLOAT32.dtype)

    def step():
        start = time.perf_counter()
        forward(params, config, np.array([[5]]), cache=cache, logits="last", numerics=FLOAT32)
        return time.perf_counter() - start

    forward(params, config, np.full((1, 300), 5), cache=cache, logits="last", numerics=FLOAT32)
    kinds = {kind: logits_of(kind, V) for kind in ("peaked", "flat")}
    print(f"{'':22}{'decode':>9}{'decision':>10}{'share':>8}{'recording':>11}{'share':>8}   (best of {repeats}, ms)")
    for name, (kind, settings) in KINDS.items():
        chosen = SamplingParams(**{"temperature": 0.8} | settings)
        times = {False: [], True: []}
        decodes = []
        for _ in range(repeats):
            for record, taken in times.items():
                decodes.append(step())
                start = time.perf_counter()
                decide(kinds[kind], chosen, PROMPT, OUTPUT, 0.37, record=record)
                if record:
                    kinds[kind].copy()
                taken.append(time.perf_counter() - start)
        decode, plain, recorded = min(decodes), min(times[False]), min(times[True])
        print(
            f"{name:22}{1e3 * decode:9.1f}{1e3 * plain:10.2f}{plain / decode:8.1%}"
            f"{1e3 * (recorded - plain):11.2f}{(recorded - plain) / decode:8.1%}",
            flush=True,
        )
    print("\nwriting a record afterwards, a token")
    for name in ("temperature", "top_p 0.9", "top_k 50, top_p 0.9"):
        chosen = SamplingParams(**{"temperature": 0.8, "seed": 1} | KINDS[name][1])
        written = min(writing(np.stack([kinds["peaked"]] * 10), chosen) for _ in range(repeats))
        print(f"{name:22}{1e3 * decode:9.1f}{1e3 * written:10.2f}{written / decode:8.1%}", flush=True)


def writing(logits, params):
    """Seconds a token to work out a record and write it."""
    record = record_logits(logits, params)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        record.save(Path(folder) / "run.jsonl")
        return (time.perf_counter() - start) / len(logits)


if __name__ == "__main__":
    sys.exit(main())
