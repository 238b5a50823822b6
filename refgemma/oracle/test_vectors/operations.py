"""Inputs, exact outputs and rounding bounds of every operation of a model, for ports that test one function at a time.

One layer of the model's widths is run once in float64. At each named tensor the result is kept, and the next operation
reads it rounded to bfloat16: so every operation has inputs that any engine holds exactly, whatever it computes in, and
its bound is that of this one operation. Whole attention and the whole MLP are run again without rounding in
between.
Weights are the formula of `refgemma.oracle.formula_models.formula`, so that they need not be stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from refgemma.checkpoint.names import tensors_of
from refgemma.config import Config
from refgemma.model import forward
from refgemma.numerics import Array, Bfloat16Matrix, from_bfloat16, to_bfloat16
from refgemma.oracle.bounds.arithmetic import arithmetic_of
from refgemma.oracle.bounds.flow import Flow
from refgemma.oracle.bounds.slack import Bound, Known
from refgemma.oracle.formula_models.formula import weight
from refgemma.oracle.operations import KINDS, OPERATIONS, Operation, split_name
from refgemma.params import Params, build

ARITHMETICS = ("float32", "bfloat16")
TOKENS = (2, 5, 11, 60)
_POSITIONS = (0, 1, 257, 301)  # odd ones beyond 256 are no bfloat16 numbers
ROWS = 64  # of the table: enough for TOKENS, and for a head
QUIET, QUIET_ROW = 10, 5  # that row is smaller by 2**-10, so that eps counts
_RMS = 255 / math.sqrt(3)  # of the formula's numbers, before the power of two
_LAYER = "layers.0."


class Listed(NamedTuple):
    """One entry of the vectors: an operation, its inputs and its formula."""

    name: str
    does: str
    formula: str
    inputs: tuple[str, ...]
    weight: str = ""


def _listed(row: Operation) -> Listed:
    """A row of the table, for a model of one layer and a tied head."""
    stream = "out" if row.name == "final_norm" else "embed"
    inputs = tuple(stream if name == "stream" else name for name in row.made_from)
    if row.weight == "head":
        return Listed(row.name, "head, tied to the table", row.formula, inputs, "embed")
    return Listed(row.name, KINDS[row.kind], row.formula, inputs, row.weight)


LISTED = tuple(map(_listed, OPERATIONS.values()))

# Runs from start to end: output, what it does, formula, inputs.
WHOLE = {
    "attention": Listed(
        "attn.mix", "rope, scores, softmax, mix", "all of it", ("attn.q", "attn.k", "attn.v", "positions")
    ),
    "mlp": Listed("mlp.down", "gate, up, GELU, product, down", "all of it", ("mlp.norm",)),
}
_ON_THE_WAY = (
    *("attn.q_rope", "attn.k_rope", "attn.scores", "attn.probs", "attn.mix"),
    *("mlp.gate", "mlp.up", "mlp.act", "mlp.gated", "mlp.down"),
)


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight: which number it has in the formula, its shape and its power of two."""

    name: str
    number: int
    shape: tuple[int, ...]
    exponent: int
    numbers: Array


@dataclass(frozen=True, eq=False)
class Result:
    """One operation in one arithmetic."""

    exact: Array  # the result, with constants as that arithmetic rounds them
    bound: Bound  # how far an engine's own may be off


@dataclass(frozen=True, eq=False)
class Vectors:
    """All of them."""

    config: Config  # one layer, `ROWS` rows of the table
    tokens: Array  # (1, T)
    positions: Array  # (1, T)
    weights: list[Weight]  # in the order of their numbers
    inputs: dict[str, Array]  # tensors that operations start from: bfloat16 numbers
    results: dict[tuple[str, str], Result]  # by operation (a name, or a key of `WHOLE`) and arithmetic


def operation_vectors(config: Config, progress: Callable[[int, int], None] | None = None) -> Vectors:
    """Compute the vectors of a model's widths."""
    config = replace(config, layers=config.layers[:1], vocab_size=ROWS, tie_word_embeddings=True)
    tokens = np.array([TOKENS])
    positions = np.array([[min(p, config.max_positions - len(TOKENS) + i) for i, p in enumerate(_POSITIONS)]])
    weights = _weights(config)
    params = _params(weights)
    inputs: dict[str, Array] = {}
    results: dict[tuple[str, str], Result] = {}
    passes = [(arithmetic, whole) for whole in (False, True) for arithmetic in ARITHMETICS]
    for done, (arithmetic, whole) in enumerate(passes):
        a = arithmetic_of(arithmetic)
        flow = Flow(params, config, a)
        flow.next_chunk(tokens, positions)

        def tap(name: str, value: Array, flow: Flow = flow, arithmetic: str = arithmetic, whole: bool = whole) -> Array:
            step = split_name(name)[1]
            bound = flow.bound_of(name, value)
            carried = whole and step in _ON_THE_WAY
            ends = next((key for key, operation in WHOLE.items() if operation.name == step), None)
            if not whole:
                results[step, arithmetic] = Result(value, bound)
                inputs.setdefault(step, from_bfloat16(to_bfloat16(value.astype(np.float32))))
            elif ends is not None:
                results[ends, arithmetic] = Result(value, bound)
            known = Known(value, bound.worst, bound.variance) if carried and ends is None else _given(inputs[step])
            flow.goes_on_with(name, known)
            return known.value

        forward(params, config, tokens, positions=positions, numerics=a.reference, tap=tap)
        if progress is not None:
            progress(done + 1, len(passes))
    return Vectors(config, tokens, positions, weights, inputs, results)


def _given(value: Array) -> Known:
    return Known(value.astype(np.float64))


def _weights(config: Config) -> list[Weight]:
    """Every weight of the layer, of sizes that keep the numbers moderate."""
    weights = []
    for number, tensor in enumerate(tensors_of(config)):
        name = tensor.path.removeprefix(_LAYER)
        if len(tensor.shape) == 1:
            exponent = 8
        else:  # vectors of rms 1 stay so, or scores would be large; the stream begins with rms 3
            exponent = round(math.log2(_RMS * math.sqrt(tensor.shape[1]) / (3 if name == "embed" else 1)))
        numbers = weight(number, math.prod(tensor.shape), exponent).reshape(tensor.shape)
        if name == "embed":
            numbers[QUIET_ROW] *= np.float32(2.0**-QUIET)
        weights.append(Weight(name, number, tensor.shape, exponent, numbers))
    return weights


def _params(weights: list[Weight]) -> Params:
    flat: dict[str, Any] = {
        _LAYER * ("." in w.name) + w.name: w.numbers if w.numbers.ndim == 1 else Bfloat16Matrix(to_bfloat16(w.numbers))
        for w in weights
    }
    return build(flat | {"head": flat["embed"]})
