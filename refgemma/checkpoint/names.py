"""The name table: the name of each tensor in Hugging Face files, its path in the parameters, and its axes.

Matrices keep the stored order, (out, in); heads are split later, on the activations, never on the weight. Braces hold
the layer number, and ``(N H)`` is one axis that joins two: N heads of width H.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from refgemma.config import Config


class Row(NamedTuple):
    """One row of the table; ``{i}`` is the layer."""

    name: str  # in the file
    path: str  # in the parameters
    axes: str


TABLE = (
    Row("model.embed_tokens.weight", "embed", "V D"),
    Row("model.layers.{i}.input_layernorm.weight", "layers.{i}.attn.norm", "D"),
    Row("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attn.q", "(N H) D"),
    Row("model.layers.{i}.self_attn.k_proj.weight", "layers.{i}.attn.k", "(K H) D"),
    Row("model.layers.{i}.self_attn.v_proj.weight", "layers.{i}.attn.v", "(K H) D"),
    Row("model.layers.{i}.self_attn.o_proj.weight", "layers.{i}.attn.out", "D (N H)"),
    # The name misleads: in Gemma 1 this is the norm *before* the MLP. From Gemma 2 on the name is true.
    Row("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp.norm", "D"),
    Row("model.layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.gate", "F D"),
    Row("model.layers.{i}.mlp.up_proj.weight", "layers.{i}.mlp.up", "F D"),
    Row("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.mlp.down", "D F"),
    Row("model.norm.weight", "final_norm", "D"),
    Row("lm_head.weight", "head", "V D"),  # absent where the head is tied to the embedding
)

# Left over from old conversions: the rotary frequencies, which follow from rope_theta and are computed from it.
IGNORED = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)


class Tensor(NamedTuple):
    """A tensor of one model: a row of the table with its layer number filled in, and its shape."""

    name: str  # in the file
    path: str  # in the parameters
    axes: str
    shape: tuple[int, ...]


def tensors_of(config: Config) -> list[Tensor]:
    """Every tensor that a model must have; the head only if it is not tied to the embedding."""
    return [
        Tensor(row.name.format(i=i), row.path.format(i=i), row.axes, shape_of(row.axes, config, i))
        for row in TABLE
        for i in (range(config.num_layers) if "{i}" in row.name else range(1))
        if not (row.path == "head" and config.tie_word_embeddings)
    ]


def shape_of(axes: str, config: Config, layer: int = 0) -> tuple[int, ...]:
    """Shape of a string of axis letters, in one layer."""
    row = config.layers[layer]
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": row.intermediate_size,
        "N": row.num_heads,
        "K": row.num_kv_heads,
        "H": row.head_dim,
    }
    joined = re.findall(r"\((.+?)\)|(\w)", axes)  # a group in parentheses, or a letter
    return tuple(math.prod(sizes[letter] for letter in (group or letter).split()) for group, letter in joined)
