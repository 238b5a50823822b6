"""A small random model whose output varies, with a row for each of the 500 pieces of the small tokenizer.

Its head is a matrix of its own: a random model with a tied one says its last token again, nearly always.
"""

from dataclasses import replace

import numpy as np

from tests.models import random_model

SIZES = {
    "num_layers": 2,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "query_scale": 6**-0.5,
}


def talker(seed=2, *, max_positions):
    """The model; its logits have a standard deviation of about 2."""
    model = random_model(seed, vocab_size=500, max_positions=max_positions, tie_word_embeddings=False, **SIZES)
    head = np.random.default_rng(seed).normal(size=(500, 40)) * 2 / 40**0.5
    return replace(model, params=model.params | {"head": head.astype(np.float32)})
