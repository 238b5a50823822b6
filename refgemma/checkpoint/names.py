"""Tables of names and sizes: each tensor's name in Hugging Face files, its path and axes; the published models.

Matrices keep the stored order, (out, in); heads are split later, on the activations, never on the weight. Braces hold
the layer number, and ``(N H)`` is one axis that joins two: N heads of width H.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from refgemma.config import Config, axis_sizes


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

FAMILIES = {"gemma1": "Gemma 1", "gemma2": "Gemma 2", "gemma3": "Gemma 3"}

# Sizes of the published models, by the letters of their axes. google-deepmind/gemma at 54718dcd8, gemma/transformer.py;
# google/gemma_pytorch at 014acb7, gemma/config.py; V as in the Hugging Face files.
SHAPES: dict[str, dict[str, Any]] = {
    "gemma-2b": {"family": "gemma1", "V": 256000, "D": 2048, "F": 16384, "L": 18, "N": 8, "K": 1, "H": 256},
    "gemma-7b": {"family": "gemma1", "V": 256000, "D": 3072, "F": 24576, "L": 28, "N": 16, "K": 16, "H": 256},
    "gemma-2-2b": {"family": "gemma2", "V": 256000, "D": 2304, "F": 9216, "L": 26, "N": 8, "K": 4, "H": 256},
    "gemma-2-9b": {"family": "gemma2", "V": 256000, "D": 3584, "F": 14336, "L": 42, "N": 16, "K": 8, "H": 256},
    "gemma-2-27b": {"family": "gemma2", "V": 256000, "D": 4608, "F": 36864, "L": 46, "N": 32, "K": 16, "H": 128},
    "gemma-3-270m": {"family": "gemma3", "V": 262144, "D": 640, "F": 2048, "L": 18, "N": 4, "K": 1, "H": 256},
    "gemma-3-1b": {"family": "gemma3", "V": 262144, "D": 1152, "F": 6912, "L": 26, "N": 4, "K": 1, "H": 256},
    "gemma-3-4b": {"family": "gemma3", "V": 262208, "D": 2560, "F": 10240, "L": 34, "N": 8, "K": 4, "H": 256},
    "gemma-3-12b": {"family": "gemma3", "V": 262208, "D": 3840, "F": 15360, "L": 48, "N": 16, "K": 8, "H": 256},
    "gemma-3-27b": {"family": "gemma3", "V": 262208, "D": 5376, "F": 21504, "L": 62, "N": 32, "K": 16, "H": 128},
}


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
    sizes = axis_sizes(config, layer)
    joined = re.findall(r"\((.+?)\)|(\w)", axes)  # a group in parentheses, or a letter
    return tuple(math.prod(sizes[letter] for letter in (group or letter).split()) for group, letter in joined)
