"""The shape of gemma-2b, with random weights: 5 GB on disk, some 16 GB of memory, a few minutes. Marked `slow`."""

import json
import shutil

import numpy as np
import pytest

import refgemma
from refgemma.checkpoint.names import tensors_of
from refgemma.numerics import to_bfloat16
from tests.models import hf_config

CONFIG = refgemma.SIZES["gemma-2b"]
NEEDED = 6 * 10**9  # bytes of disk


@pytest.fixture(scope="module")
def folder(tmp_path_factory, gemma_tokenizer):
    """A checkpoint as Google's: bfloat16, one file, written tensor by tensor."""
    folder = tmp_path_factory.mktemp("gemma-2b")
    if shutil.disk_usage(folder).free < NEEDED:
        pytest.skip(f"needs {NEEDED:,} bytes of disk in {folder}")
    (folder / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    shutil.copy(gemma_tokenizer.path, folder / "tokenizer.model")
    entries, end = {}, 0
    for tensor in tensors_of(CONFIG):
        begin, end = end, end + 2 * int(np.prod(tensor.shape))
        entries[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors_of(CONFIG):
            spread = np.float32(0.02 if len(tensor.shape) == 2 else 0.1)
            for start in range(0, tensor.shape[0], 4096):  # rows at a time, so that no tensor is held in float32
                rows = min(4096, tensor.shape[0] - start)
                part = rng.standard_normal((rows, *tensor.shape[1:]), dtype=np.float32) * spread
                file.write(to_bfloat16(part).tobytes())
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_every_way_to_hold_the_weights_gives_the_same_logits(folder):
    tokens = [2, 651, 6037, 576, 6081, 603]
    truth = refgemma.load(folder, numerics="float64", weights="bfloat16").logits(tokens)
    scale = np.abs(truth).max()
    assert truth.shape == (len(tokens), CONFIG.vocab_size)
    for weights in ("bfloat16", "float32"):
        gemma = refgemma.load(folder, weights=weights)
        # Sums of up to 16,384 terms in blocks, 18 layers deep: the small models' worst error is 53 units of 2**-24 at
        # 4 layers and sums of 200; errors grow with the root of depth and length, hence 53 * sqrt(4.5 * 82).
        assert np.abs(gemma.logits(tokens) - truth).max() <= 1000 * 2**-24 * scale, weights
        # It can fail: other tokens, or a position more, are far away.
        assert np.abs(gemma.logits([2, *tokens])[1:] - truth).max() > 1e-3 * scale
        out = gemma.generate("The capital of France is", max_tokens=3, temperature=0.0)
        assert len(out.tokens) == 3 or out.finish_reason == "stop"
        del gemma
