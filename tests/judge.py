"""How far a forward pass is from the truth, and how far it may be.

Errors are relative to the largest true logit of a model.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from refgemma.model import forward
from refgemma.numerics import FLOAT64, PROFILES
from tests.models import digest, random_model, widened
from tests.truth import truth_logits

MODELS = 200
UNIT = 2.0**-24  # half the spacing of float32 numbers just above 1: what one rounding in float32 does

# The bar of this project. Measured: worst 4e-15, median 1e-15 (float64 rounds at 1.1e-16, and a peaked softmax over
# four layers passes some of it on); the rest is room for other processors. Every known bug is beyond 1e-9.
FLOAT64_BOUND = 1e-12

model_of = functools.cache(random_model)


@functools.cache
def truth_of(seed):
    """True logits of random model `seed`, (B, T, V)."""
    model = model_of(seed)
    return truth_logits(model.params, model.config, model.tokens, model.positions)


@functools.cache
def ours_of(seed, numerics):
    """Our logits of random model `seed` in "float32" or "float64", (B, T, V)."""
    return run(model_of(seed), numerics=PROFILES[numerics])


@functools.cache
def float32_bounds():
    """Largest error of float32 allowed for each random model: twice that of transformers, and four roundings.

    Twice, because the order of summation is free: two good orders differ in luck. Four roundings, for models so shallow
    that the error of transformers is itself a rounding or two.
    """
    path = Path(__file__).parent / "goldens" / "transformers_float32_error.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["models"]
    if [entry["digest"] for entry in entries] != [digest(model_of(seed)) for seed in range(MODELS)]:
        pytest.fail(f"{path.name} is about other models: run python -m tests.peers.make_transformers_golden")
    return [(2 * entry["error"] + 4) * UNIT for entry in entries]


def run(model, *, numerics, params=None, tokens=None, **arguments):
    """Our logits for a random model, with other params, tokens or arguments where given."""
    if params is None:
        params = widened(model.params) if numerics is FLOAT64 else model.params
    tokens = model.tokens if tokens is None else tokens
    return forward(params, model.config, tokens, numerics=numerics, **{"positions": model.positions} | arguments)


def error(got, want):
    """Largest difference over the largest true logit."""
    return np.abs(got - want).max() / np.abs(want).max()
