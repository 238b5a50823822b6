"""Bytes and operations, counted again in a forward pass that tells of every product it computes."""

import numpy as np
import pytest

from refgemma import model
from refgemma.bench import counts
from refgemma.cache import KVCache
from refgemma.checkpoint.load import load_params
from refgemma.config import SIZES
from refgemma.model import forward


@pytest.fixture
def counted(monkeypatch, folder, config):
    """``counted(tokens, context, rows)``: operations with weights, and bytes of the weights that were multiplied."""
    params = load_params(folder, config, weights="bfloat16")
    linears = model.linears
    products = []

    def counting(x, weights, **options):
        products.extend((2 * x.size * w.shape[0], w.nbytes) for w in weights)
        return linears(x, weights, **options)

    monkeypatch.setattr(model, "linears", counting)
    monkeypatch.setattr(model, "linear", lambda x, w, **options: counting(x, (w,), **options)[0])

    def counted(tokens, context=0, rows=1):
        cache = KVCache(config, batch=rows, capacity=context + tokens)
        if context:
            forward(params, config, np.ones((rows, context), int), cache=cache)
        products.clear()
        forward(params, config, np.ones((rows, tokens), int), cache=cache, logits="last")
        assert cache.length == context + tokens
        return tuple(map(sum, zip(*products, strict=True)))

    return counted


@pytest.mark.parametrize(("tokens", "context", "rows"), [(1, 5, 1), (7, 0, 1), (3, 4, 2), (1, 9, 8)])
def test_operations_are_those_of_a_forward_pass(counted, config, tokens, context, rows):
    with_weights, _ = counted(tokens, context, rows)
    # Scores and mix: each query head, for each pair of a query and a key not after it, H products and sums, twice.
    pairs = sum(1 for query in range(context, context + tokens) for key in range(context + tokens) if key <= query)
    attention = rows * 2 * 4 * pairs * (12 + 12) * 2
    assert counts.operations(config, tokens=tokens, context=context, rows=rows) == with_weights + attention


def test_bytes_are_those_of_a_forward_pass(counted, config):
    _, weight_bytes = counted(1, 5, 2)
    cache = KVCache(config, batch=2, capacity=6)
    held = cache.nbytes
    assert counts.cache_bytes(config, 6, 2) == held
    assert counts.bytes_read(config, "bfloat16", context=6, rows=2) == weight_bytes + held
    assert counts.bytes_read(config, "float32", context=6, rows=2) == 2 * weight_bytes + held


def test_gemma_2b_by_hand():
    config = SIZES["gemma-2b"]
    layer = 2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 2048 * 16_384  # q and out, k and v, the MLP
    assert counts.weights_read(config) == 18 * layer + 256_000 * 2048
    norms = (2 * 18 + 1) * 2048
    assert counts.weights_read(config) + norms == config.num_parameters  # the table is read once: as the head
