"""What a piece of work costs at least: bytes that must be read, and floating-point operations.

A product with an (O, I) matrix takes ``2 O I`` operations per token: a multiplication and an addition per weight.
A call reads each matrix once, however many tokens it feeds: memory limits one token alone, arithmetic limits many.

References
----------
Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model", 2009.
"""

from __future__ import annotations

import math

from refgemma.checkpoint.names import Tensor, tensors_of
from refgemma.config import Config

BYTES = {"float32": 4, "bfloat16": 2}  # per number


def multiplied(config: Config) -> list[Tensor]:
    """Matrices that a token is multiplied with: all, the embedding only where it is the head."""
    matrices = [tensor for tensor in tensors_of(config) if len(tensor.shape) == 2]
    return [tensor for tensor in matrices if tensor.path != "embed" or config.tie_word_embeddings]


def weights_read(config: Config) -> int:
    """Weights that one call reads."""
    return sum(math.prod(tensor.shape) for tensor in multiplied(config))


def cache_bytes(config: Config, positions: int, rows: int = 1) -> int:
    """Size of keys and values in float32."""
    return 2 * 4 * sum(c.num_kv_heads * c.head_dim for c in config.layers) * positions * rows


def bytes_read(config: Config, weights: str, *, context: int, rows: int = 1) -> int:
    """Bytes that one call reads at least: all weights once, and the keys and values of its context."""
    return BYTES[weights] * weights_read(config) + cache_bytes(config, context, rows)


def operations(config: Config, *, tokens: int, context: int = 0, rows: int = 1) -> int:
    """Multiplications and additions in the products of one call that returns the logits of its last position."""
    head = config.vocab_size * config.hidden_size
    layers = weights_read(config) - head
    pairs = sum(range(context + 1, context + tokens + 1))
    # Scores and mix, H multiplications and additions each, per pair and query head.
    attention = 2 * 2 * sum(c.num_heads * c.head_dim for c in config.layers) * pairs
    return rows * (2 * layers * tokens + 2 * head + attention)
