"""Random weights of every kind that a product takes."""

import numpy as np

from refgemma.numerics import Bfloat16Matrix, from_bfloat16, to_bfloat16

DTYPES = (np.float32, np.float64)
KINDS = [  # of weight, and dtype of activations: all that is not narrowing
    *((kind, dtype) for kind in ("bfloat16", "float16", "float32") for dtype in DTYPES),
    ("float64", np.float64),
]


def unit(dtype):
    """What one rounding does, relatively."""
    return float(np.finfo(dtype).eps) / 2


def values(w):
    """The numbers of any operand without deltas."""
    return from_bfloat16(w.bits) if isinstance(w, Bfloat16Matrix) else w


def normal(rng, *shape, dtype=np.float32):
    return rng.normal(size=shape).astype(dtype)


def weight(rng, O, I, kind):
    w = normal(rng, O, I)
    return Bfloat16Matrix(to_bfloat16(w)) if kind == "bfloat16" else w.astype(kind)


def use_threads(monkeypatch, count):
    monkeypatch.setattr("refgemma.compute.threads._chosen", count)
