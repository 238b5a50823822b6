"""Folders written by transformers itself, whole and in shards, are read as they are."""

import numpy as np
import pytest

from refgemma.checkpoint.folder import read_folder
from refgemma.checkpoint.load import load_params
from refgemma.checkpoint.names import tensors_of
from refgemma.config import read_config
from tests.models import hf_config, random_config

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_folders_written_by_transformers_are_read(tmp_path, dtype, shard_size, tied):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = random_config(np.random.default_rng(3), 2, tie_word_embeddings=tied)
    torch.manual_seed(4)
    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**hf_config(config))).to(getattr(torch, dtype))
    for name, weight in model.named_parameters():
        if "norm" in name:  # they begin as zeros, which would hide a swap
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)

    assert read_config(tmp_path) == config
    assert (len({tensor.file for tensor in read_folder(tmp_path).values()}) > 1) == (shard_size == "20KB")
    params = load_params(tmp_path, config)
    theirs = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    for tensor in tensors_of(config):
        ours = params
        for part in tensor.path.split("."):
            ours = ours[int(part) if part.isdigit() else part]
        np.testing.assert_array_equal(ours, theirs[tensor.name], strict=True)
