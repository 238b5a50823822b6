"""The lookup against ``table[t] * sqrt(D)``; a factor that is absent, doubled or rounded is rejected."""

import math

import numpy as np
import pytest

from refgemma.numerics import FLOAT32, FLOAT64, Bfloat16Matrix, Numerics, from_bfloat16, to_bfloat16
from refgemma.ops.embedding import embed
from refgemma.ops.linear import Adapted, Delta

OPERATIONS = ("embed",)
pytestmark = pytest.mark.usefixtures("on_each_library")

V, D = 11, 40  # sqrt(40) is no bfloat16 number
TOKENS = np.array([[0, 3, 10], [3, 3, 1]])


def example(kind):
    table = np.random.default_rng(1).normal(size=(V, D)).astype(np.float32)
    bits = to_bfloat16(table)
    return (Bfloat16Matrix(bits), from_bfloat16(bits)) if kind == "bfloat16" else (table, table)


def within(want, numerics):
    # Two roundings, of the root and of the product; by hand there are as many in float64.
    return 2 * (np.finfo(numerics.dtype).eps / 2 + 2.0**-53) * np.abs(want)


@pytest.mark.parametrize("numerics", [FLOAT32, FLOAT64], ids=lambda n: n.name)
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_embed_is_a_row_times_sqrt_D(kind, numerics):
    table, values = example(kind)
    got = embed(TOKENS, table, numerics=numerics)
    want = values[TOKENS].astype(np.float64) * math.sqrt(D)
    assert got.dtype == numerics.dtype
    assert np.all(np.abs(got - want) <= within(want, numerics))
    for mistaken in (
        want / math.sqrt(D),  # A1
        want * math.sqrt(D),  # A4
        values[TOKENS].astype(np.float64) * 6.3125,  # A2: sqrt(40) = 6.3246 in bfloat16
    ):
        assert np.all(np.abs(got - mistaken) > within(mistaken, numerics))
    got[:] = 0
    assert np.all(values != 0)  # the table is not written through


def test_the_rounded_factor_is_a_rounding_point():
    table, values = example("bfloat16")
    numerics = Numerics("A2", np.dtype(np.float32), {"embed.scale": "bfloat16"})
    assert np.array_equal(embed(TOKENS, table, numerics=numerics), values[TOKENS] * np.float32(6.3125))


@pytest.mark.parametrize("numerics", [FLOAT32, FLOAT64], ids=lambda n: n.name)
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_a_delta_of_the_table_is_scaled_with_it(kind, numerics):
    """A5 scales the base alone: https://github.com/huggingface/peft/pull/2825."""
    rng = np.random.default_rng(2)
    table, values = example(kind)
    a, b = rng.normal(size=(2, V)).astype(np.float32), rng.normal(size=(D, 2)).astype(np.float32)
    got = embed(TOKENS, Adapted(table, (Delta(a=a, b=b, scale=0.5),)), numerics=numerics)
    base = values.astype(np.float64)
    delta = 0.5 * (b.astype(np.float64) @ a).T
    size = np.abs(base) + 0.5 * (np.abs(b).astype(np.float64) @ np.abs(a)).T
    want = ((base + delta) * math.sqrt(D))[TOKENS]
    # R = 2 products and a sum in the delta, the sum with the base, the root and the last product: 6 roundings at most.
    bound = 6 * (np.finfo(numerics.dtype).eps / 2 + 2.0**-53) * size[TOKENS] * math.sqrt(D)
    assert np.all(np.abs(got - want) <= bound)
    unscaled = (base * math.sqrt(D) + delta)[TOKENS]
    assert np.any(np.abs(got - unscaled) > bound)
