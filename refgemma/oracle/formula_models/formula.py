"""Tiny models whose weights are a formula: a port can be checked without a download and without Python.

Number n of tensor t is the integer hash below of ``0x9E3779B9 (t + 1) + n``, in 32-bit unsigned arithmetic; its highest
byte b becomes ``(2 b - 255) 2**-e``, or in the MLP ``b 2**-9``: whole numbers below 256 times a power of two, which
float32 and bfloat16 hold exactly. Sizes and numbers expose mistakes: H is never D / N, all widths differ, neither
sqrt(D) nor 1 + weight is a bfloat16 number, some tokens are so quiet that eps counts, a row is padded on the left, and
one starts at position 300. The matrices of the MLP have no negative numbers, so that what GELU in its erf form adds,
which is never negative, adds up.

`python -m tests.oracle.publish` writes their tokens, logits and traces into ``data/``, and the table that shows how far
each known bug moves the logits.

References
----------
The hash is lowbias32 of Chris Wellons' hash-prospector (public domain), https://github.com/skeeto/hash-prospector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from refgemma.checkpoint.names import TABLE as CHECKPOINT
from refgemma.checkpoint.names import shape_of
from refgemma.config import Config
from refgemma.numerics import Array
from refgemma.ops.linear import Adapted, Delta
from refgemma.params import Params, build

MATRIX, TABLE, GAIN = 9, 8, 8  # e of a matrix, of the embedding table, and of the weight of a norm
QUIET, EVERY = 10, 8  # rows 5, 13, 21, ... of the table are smaller by 2**-10


@dataclass(frozen=True, kw_only=True, eq=False)
class FormulaModel:
    """One such model and the batch it is run on."""

    name: str  # what users call it
    title: str  # what it is for
    config: Config  # shape and constants
    tokens: Array  # BT
    positions: Array  # BT; -1 for padding
    rank: int = 0  # of the adapter on the embedding; 0 for none

    @property
    def params(self) -> Params:
        """Weights, float32."""
        return params_of(self)


@dataclass(frozen=True)
class Tensor:
    """One tensor of the formula."""

    number: int  # which one, t
    name: str  # path in params
    hf_name: str  # in a Hugging Face checkpoint; the factors of an adapter have their path
    shape: tuple[int, ...]  # in row-major order
    exponent: int  # the power of two that divides, e
    signed: bool = True  # ``2 b - 255`` rather than ``b``

    @property
    def values(self) -> Array:
        """Its numbers, float32."""
        size = int(np.prod(self.shape))
        return weight(self.number, size, self.exponent, signed=self.signed).reshape(self.shape)


def weight(number: int, count: int, exponent: int, *, signed: bool = True) -> Array:
    """Numbers of one tensor."""
    x = np.uint32(0x9E3779B9 * (number + 1) % 2**32) + np.arange(count, dtype=np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    byte = (x ^ (x >> np.uint32(16))) >> np.uint32(24)
    whole = byte.astype(np.int32)
    return ((2 * whole - 255 if signed else whole) * 2.0**-exponent).astype(np.float32)


def tensors_of(model: FormulaModel) -> Iterator[Tensor]:
    """Every tensor of a model."""
    c = model.config
    D, V, R = c.hidden_size, c.vocab_size, model.rank
    yield Tensor(0, "embed", "model.embed_tokens.weight", (V, D), TABLE)
    number = 1
    for i in range(c.num_layers):
        for row in (row for row in CHECKPOINT if "{i}" in row.path):
            shape, name = shape_of(row.axes, c, i), row.path.format(i=i)
            signed = len(shape) == 1 or ".mlp." not in name
            yield Tensor(number, name, row.name.format(i=i), shape, GAIN if len(shape) == 1 else MATRIX, signed)
            number += 1
    yield Tensor(number, "final_norm", "model.norm.weight", (D,), GAIN)
    if R:
        yield Tensor(number + 1, "embed.lora_a", "embed.lora_a", (R, V), TABLE)
        yield Tensor(number + 2, "embed.lora_b", "embed.lora_b", (D, R), MATRIX)


def params_of(model: FormulaModel) -> Params:
    """Weights of a model, from the formula."""
    flat: dict[str, Any] = {tensor.name: tensor.values for tensor in tensors_of(model)}
    table = flat["embed"]
    table[5::EVERY] *= np.float32(2.0**-QUIET)
    if model.rank:
        a, b = flat.pop("embed.lora_a"), flat.pop("embed.lora_b")
        flat["embed"] = Adapted(table, (Delta(a=a, b=b, scale=1.0),))
    return build(flat | {"head": table})


def find(name: str) -> FormulaModel | None:
    """The model with a name, or None."""
    return next((model for model in MODELS if model.name == name), None)


def _config(**shape: int) -> Config:
    constants = {"max_positions": 8192, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    return Config.uniform(**(constants | {"query_scale": shape["head_dim"] ** -0.5} | shape))


def _batch(V: int, T: int, starts: tuple[int, ...], padding: tuple[int, ...]) -> tuple[Array, Array]:
    """Rows of tokens 2 (<bos>), then 5 (a quiet one), then by stride, from a position on, with padding on the left."""
    tokens = np.zeros((len(starts), T), np.int64)
    positions = np.full_like(tokens, -1)
    for b, (start, pad) in enumerate(zip(starts, padding, strict=True)):
        count = np.arange(T - pad)
        tokens[b, pad:] = (2 + 3 * count + 7 * b * (count > 1)) % V
        positions[b, pad:] = start + count
    return tokens, positions


def _model(
    name: str, title: str, config: Config, T: int, starts: tuple[int, ...], padding: tuple[int, ...], rank: int = 0
) -> FormulaModel:
    tokens, positions = _batch(config.vocab_size, T, starts, padding)
    return FormulaModel(name=name, title=title, config=config, tokens=tokens, positions=positions, rank=rank)


# fmt: off
MODELS = (
    _model("reveal-gqa", "1 < K < N; one row padded, one far along",
           _config(vocab_size=50, hidden_size=40, intermediate_size=56, num_layers=2, num_heads=4, num_kv_heads=2,
                   head_dim=12), T=8, starts=(0, 0, 300), padding=(0, 3, 0)),
    _model("reveal-mqa", "K = 1; one row padded",
           _config(vocab_size=44, hidden_size=56, intermediate_size=72, num_layers=2, num_heads=3, num_kv_heads=1,
                   head_dim=16), T=10, starts=(0, 0), padding=(0, 4)),
    _model("reveal-lora", "K = N, and an adapter on the embedding",
           _config(vocab_size=46, hidden_size=40, intermediate_size=64, num_layers=2, num_heads=3, num_kv_heads=3,
                   head_dim=20), T=10, starts=(0,), padding=(0,), rank=2),
    _model("reveal-far", "positions beyond 8191",
           _config(vocab_size=42, hidden_size=40, intermediate_size=56, num_layers=1, num_heads=2, num_kv_heads=1,
                   head_dim=12, max_positions=262144), T=8, starts=(131064,), padding=(0,)),
)
# fmt: on
