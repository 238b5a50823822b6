"""Steps and prompts timed in turn with what the machine can do, so that a shared machine's moods fall on both alike."""

from __future__ import annotations

from typing import TypeAlias, cast

import numpy as np

from refgemma.bench import plan
from refgemma.bench.limits import products, tile_loops
from refgemma.compute.products import times_transposed
from refgemma.config import Config
from refgemma.model import Params
from refgemma.numerics import FLOAT32, Array, Bfloat16Matrix

Matrix: TypeAlias = Array | Bfloat16Matrix


def limits(engine: plan.Engine, params: Params, config: Config) -> None:
    """Hold one step, and one prompt, against their limits; tell the times, and the rates of the limits."""
    groups = _groups(params)
    _steps(engine, groups, np.random.default_rng(3))
    gate = groups[2][0]
    wide = gate.rows(slice(None), FLOAT32.dtype) if isinstance(gate, Bfloat16Matrix) else gate
    _prompts(engine, wide, plan.prompt(config, plan.SHORT), np.random.default_rng(3))


def _steps(engine: plan.Engine, groups: list[list[Matrix]], rng: np.random.Generator) -> None:
    """A step, its matrix products alone, and memory as fast as it can be read: gemv, or a bare tile loop."""
    x = {width: rng.standard_normal((1, width), np.float32) for width in {ws[0].shape[1] for ws in groups}}

    def inside() -> None:
        for ws in groups:
            times_transposed(x[ws[0].shape[1]], ws)

    narrow = [w.bits for ws in groups for w in ws if isinstance(w, Bfloat16Matrix)]
    head = groups[-1][0]
    bare = products(head, x[head.shape[1]][0]) if not isinstance(head, Bfloat16Matrix) else tile_loops(narrow)
    steps = [engine.decoder(plan.NEAR, rows) for rows in (1, plan.ROWS)]
    step, of_rows, alone, *streams = plan.in_turn(*steps, inside, *bare)
    plan.say("beside.decode", seconds=[step])
    plan.say("beside.decode_8_rows", seconds=[of_rows])
    plan.say("beside.products", seconds=[alone])
    plan.say("stream", rate=(sum(bits.nbytes for bits in narrow) or head.nbytes) / min(streams))


def _prompts(engine: plan.Engine, w: Array, tokens: Array, rng: np.random.Generator) -> None:
    """A prompt, and arithmetic as fast as it can be done: gemm."""
    many = [rng.standard_normal((w.shape[1], count), np.float32) for count in (plan.SHORT, 4 * plan.SHORT)]
    ways = [(way, 2 * len(w) * columns.size) for columns in many for way in products(w, columns)]
    prompt, *found = plan.in_turn(lambda: engine.prefill(tokens), *(way for way, _ in ways))
    plan.say("beside.prefill", seconds=[prompt])
    plan.say("gemm", rate=max(work / seconds for (_, work), seconds in zip(ways, found, strict=True)))


def _groups(params: Params) -> list[list[Matrix]]:
    """All matrices that a token is multiplied with, grouped as in `forward`; the head last."""
    together = [("attn", "q", "k", "v"), ("attn", "out"), ("mlp", "gate", "up"), ("mlp", "down")]
    layers = cast(list[dict[str, dict[str, Matrix]]], params["layers"])
    groups = [[layer[block][name] for name in names] for layer in layers for block, *names in together]
    return [*groups, [cast(Matrix, params["head"])]]
