"""A few digits that tell one set of weights from another: a trace is not judged by weights it was not made with.

Read from all norms and the first row of every matrix: any training step changes those, and reading them takes no time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from refgemma.model import Params
from refgemma.numerics import Bfloat16Matrix, to_host
from refgemma.ops.linear import Adapted

_DIGITS = 16


def fingerprint(params: Params) -> str:
    """Tell weights apart, however they are held in memory."""
    digest = hashlib.sha256()
    for weight in _weights(params):
        if isinstance(weight, Bfloat16Matrix):
            first = weight.rows(slice(0, 1), np.dtype(np.float32))
        elif isinstance(weight, Adapted):
            return ""
        else:
            first = weight[:1] if weight.ndim == 2 else weight
        digest.update(f"{weight.shape} ".encode() + to_host(first).astype("<f4").tobytes())
    return digest.hexdigest()[:_DIGITS]


def _weights(params: Params) -> Iterator[Any]:
    """All of them, in an order of their names."""
    yield params["embed"]
    for layer in params["layers"]:
        for part in (layer["attn"], layer["mlp"]):
            yield from (weight for _, weight in sorted(part.items()))
    yield params["final_norm"]
    yield params["head"]
