"""The arithmetic of a trace, told from its numbers."""

import numpy as np
import pytest

from refgemma.numerics import from_bfloat16, to_bfloat16
from refgemma.oracle import Trace
from refgemma.oracle.judging.selection import narrowest, recognised_arithmetic
from tests.models import random_model
from tests.oracle.gemmas import gemma_of, tapped

MODEL = random_model(1, num_tokens=9)


def stored(tensors, dtype="float32", meta=()):
    return Trace(tensors, dict.fromkeys(tensors, dtype), MODEL.tokens, MODEL.positions, meta=dict(meta))


def test_the_narrowest_format():
    x = np.random.default_rng(0).normal(size=100)
    assert narrowest(x) == "float64"
    assert narrowest(x.astype(np.float32)) == "float32"
    assert narrowest(x.astype(np.float16).astype(np.float64)) == "float16"
    assert narrowest(from_bfloat16(to_bfloat16(x.astype(np.float32)))) == "bfloat16"
    assert narrowest(np.array([1e30, 3e38], np.float32)) == "float32"  # float16 has no such numbers
    assert narrowest(np.array([0.0, 1.0, np.inf, np.nan])) == ""
    assert narrowest(np.array([1e300, 0.5])) == "float64"  # and no warning, which would be an error here


@pytest.mark.parametrize(
    ("numerics", "want"), [("float32", "float32"), ("float64", "float64"), ("bf16-transformers", "bfloat16")]
)
def test_what_most_tensors_hold(numerics, want):
    tensors = tapped(gemma_of(MODEL, numerics), MODEL)
    wide = {name: value.astype(np.float32) for name, value in tensors.items()}
    dtype = "float64" if numerics == "float64" else "float32"
    arithmetic, why = recognised_arithmetic(stored(tensors, dtype))
    assert arithmetic == want
    assert why.startswith(f"stored as {dtype}")
    # A few tensors in a wider format do not change it: norms, or logits, often are.
    wide["logits"] = wide["logits"] * np.float32(1.1)
    assert recognised_arithmetic(stored(wide))[0] == (want if want == "bfloat16" else "float32")


def test_half_precision_files():
    half = {name: value.astype(np.float16) for name, value in tapped(gemma_of(MODEL), MODEL).items()}
    assert recognised_arithmetic(stored(half, "float16")) == ("float16", "stored as float16")
    narrow = {name: from_bfloat16(to_bfloat16(value)) for name, value in tapped(gemma_of(MODEL), MODEL).items()}
    assert recognised_arithmetic(stored(narrow, "bfloat16")) == ("bfloat16", "stored as bfloat16")


def test_a_trace_of_ours_says_it():
    trace = stored(tapped(gemma_of(MODEL), MODEL), meta={"numerics": "bf16-deepmind"})
    assert recognised_arithmetic(trace) == ("bf16-deepmind", "as its metadata says")
