import math
from dataclasses import replace

import pytest

from refgemma.checkpoint.names import TABLE, shape_of, tensors_of
from refgemma.config import SIZES
from refgemma.errors import nearest_name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_shapes_sum_to_the_number_of_parameters(size, tied):
    config = replace(SIZES[size], tie_word_embeddings=tied)
    tensors = tensors_of(config)
    assert sum(math.prod(tensor.shape) for tensor in tensors) == config.num_parameters
    assert len(tensors) == 2 + 9 * config.num_layers + (not tied)


def test_the_table_reads_both_ways():
    for column in ("name", "path"):
        assert len({getattr(row, column) for row in TABLE}) == len(TABLE)
    assert all(("{i}" in row.name) == ("{i}" in row.path) for row in TABLE)


def test_head_width_is_not_hidden_size_over_heads():
    # The 7B size has 16 heads of width 256 on a stream of 3072, where 3072 / 16 is 192.
    # https://github.com/meta-pytorch/gpt-fast/pull/115
    assert shape_of("(N H) D", SIZES["gemma-7b"]) == (4096, 3072)
    assert shape_of("D (N H)", SIZES["gemma-7b"]) == (3072, 4096)
    assert shape_of("(K H) D", SIZES["gemma-2b"]) == (256, 2048)
    assert shape_of("F D", SIZES["gemma-2b"]) == (16_384, 2048)


def test_post_attention_layernorm_is_the_norm_before_the_mlp():
    # Gemma 2 has a tensor of this name in another place.
    ours = {row.name: row.path for row in TABLE}
    assert ours["model.layers.{i}.post_attention_layernorm.weight"] == "layers.{i}.mlp.norm"
    assert ours["model.layers.{i}.input_layernorm.weight"] == "layers.{i}.attn.norm"


def test_nearest_name_stays_in_the_layer():
    known = [tensor.name for tensor in tensors_of(SIZES["gemma-2b"])]
    assert nearest_name("model.layers.11.mlp.upproj.weight", known) == "model.layers.11.mlp.up_proj.weight"
    there = ["model.layers.4.mlp.up_proj.weight", "model.layers.3.mlp.up.weight"]
    assert nearest_name("model.layers.3.mlp.up_proj.weight", there) == "model.layers.3.mlp.up.weight"
    assert (
        nearest_name("model.layers.5.mlp.up_proj.weight", there) == "model.layers.4.mlp.up_proj.weight"
    )  # of no layer 5
    assert nearest_name("embed_tokens.weight", known) == "model.embed_tokens.weight"
    assert nearest_name("vision_tower", known) is None
