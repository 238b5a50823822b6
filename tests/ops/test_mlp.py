"""The tanh form of GELU against its formula in Python floats; the erf form and SiLU are rejected."""

import math

import numpy as np
import pytest

from refgemma.compute import threads
from refgemma.compute.threads import elementwise
from refgemma.ops.mlp import gelu
from tests.ops.weights import use_threads

OPERATIONS = ("gelu", "elementwise")
pytestmark = pytest.mark.usefixtures("on_each_library")

DTYPES = (np.float32, np.float64)


def gelu_by_hand(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


WRONG = {
    "C1: erf form": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "C2: SiLU": lambda x: x / (1 + math.exp(-x)),
    "sigmoid form": lambda x: x / (1 + math.exp(-1.702 * x)),
    "a cube of the wrong size": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.44715 * x**3))),
    "no sqrt(2 / pi)": lambda x: 0.5 * x * (1 + math.tanh(x + 0.044715 * x**3)),
}


def example(dtype):
    return np.concatenate(
        [np.linspace(-12, 12, 481), np.geomspace(1e-30, 1e6, 73), -np.geomspace(1e-30, 1e6, 73)]
    ).astype(dtype)


def within(x, dtype):
    # The argument z passes 7 roundings, constants included, and |z| tanh'(z) < 0.45: 3.2 units on tanh. NumPy's tanh is
    # good to 4 ulps, 8 units, since |tanh| <= 1. Adding 1, a value of at most 2, is 2 units, halving none, and the two
    # products 1 each of at most |x|: |x| / 2 (3.2 + 8 + 2) + 2 |x| < 9 |x| units; by hand it is less.
    return 9 * np.abs(x) * (np.finfo(dtype).eps / 2 + 2.0**-53)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_within_its_rounding_bound(dtype):
    x = example(dtype)
    before = x.copy()
    got = gelu(x)
    assert got.dtype == dtype
    assert np.all(np.abs(got - np.array([gelu_by_hand(float(v)) for v in x])) <= within(x, dtype))
    assert np.array_equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG)
def test_gelu_rejects_known_bugs(name, dtype):
    x = np.linspace(-12, 12, 481).astype(dtype)
    mistaken = np.array([WRONG[name](float(v)) for v in x])
    assert np.any(np.abs(gelu(x) - mistaken) > within(x, dtype))


def test_the_two_forms_differ_by_as_much_as_the_docstring_says():
    x = np.linspace(-10, 10, 20_001)
    gap = np.abs(gelu(x) - np.array([WRONG["C1: erf form"](v) for v in x.tolist()]))
    assert round(gap.max() * 1e4, 1) == 4.7
    assert round(abs(x[gap.argmax()]), 2) == 2.70


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_far_out(dtype):
    assert gelu(np.array([0.0, 50.0, -50.0, np.inf], dtype)).tolist() == [0.0, 50.0, 0.0, np.inf]


def test_parts_side_by_side_are_the_whole(monkeypatch):
    x = np.random.default_rng(0).normal(size=(3, 8, 5)).astype(np.float32)
    for given in (x, x[:, ::2], x.swapaxes(0, 2), x[:0], x[:1], x.swapaxes(0, 1).copy().swapaxes(0, 1)):
        monkeypatch.setattr("refgemma.compute.threads._PART", 2**18)
        whole = gelu(given)
        monkeypatch.setattr("refgemma.compute.threads._PART", 7)
        use_threads(monkeypatch, 3)
        parts = gelu(given)
        assert parts.shape == given.shape
        assert np.array_equal(parts, whole)  # number by number there is nothing to round differently


def test_a_product_side_by_side_is_the_whole(monkeypatch):
    rng = np.random.default_rng(1)
    act, up = (rng.normal(size=(3, 8, 5)).astype(np.float32) for _ in range(2))
    monkeypatch.setattr("refgemma.compute.threads._PART", 7)
    use_threads(monkeypatch, 3)
    for a, b in (
        (act, up),
        (act, up.swapaxes(0, 1).copy().swapaxes(0, 1)),
        (act[:0], up[:0]),
        (act[..., :1], up[..., :1]),
    ):
        assert np.array_equal(elementwise(np.multiply, a, b), a * b)


def test_a_part_is_a_piece_of_memory(monkeypatch):
    """Else threads would take turns with the numbers of a line."""
    monkeypatch.setattr(threads, "_PART", 16)
    use_threads(monkeypatch, 1)
    for x in (np.zeros((1, 8, 6)), np.zeros((1, 6, 8)).swapaxes(1, 2), np.zeros((2, 6, 4)).transpose(0, 2, 1)):
        parts = []
        threads.elementwise(lambda x, out, parts=parts: parts.append(x), x)
        assert len(parts) > 1
        # Raveling one piece, in the order of memory, is a view; a slice of any but the outermost axis is copied.
        assert all(np.shares_memory(part, part.ravel("K")) for part in parts)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, bool])
def test_what_a_tap_puts_in_is_multiplied_as_numpy_does(dtype):
    """A number, a row, another dtype: nothing is rounded, and shapes are those of broadcasting."""
    up = np.random.default_rng(2).normal(size=(2, 3, 5)).astype(np.float32)
    for act in (np.ones((2, 3, 5), dtype), np.ones(5, dtype), np.ones((2, 3, 1), dtype)):
        for a, b in ((act, up), (up, act)):
            got = elementwise(np.multiply, a, b)
            assert got.dtype == (a * b).dtype
            assert np.array_equal(got, a * b)
    assert not elementwise(np.multiply, 0.0, up).any()
