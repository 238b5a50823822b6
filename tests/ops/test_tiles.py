"""Products of stacks of matrices, cut along either side, for one thread and for several."""

import math

import numpy as np
import pytest

import refgemma.compute.products as module
from refgemma.compute.products import product
from tests.ops.weights import DTYPES, normal, unit

# Matrices in the stack; M, I, J. A row vector and a column, both sides the longer one, and nothing at all.
SHAPES = [
    ((), (1, 7, 5)),
    ((), (5, 7, 1)),
    ((2, 3), (4, 5, 9)),
    ((2, 3), (9, 5, 4)),
    ((1, 2), (41, 3, 41)),
    ((2, 0), (3, 4, 5)),
    ((2,), (3, 4, 0)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["as it lies", "turned", "part of a larger one"])
@pytest.mark.usefixtures("tiny_tiles")
def test_product_is_within_its_rounding_bound(layout, dtype):
    rng = np.random.default_rng(3)
    for stack, (M, I, J) in SHAPES:
        a = normal(rng, *stack, M, I, dtype=dtype)
        if layout == "turned":  # as keys are
            b = normal(rng, *stack, J, I, dtype=dtype).swapaxes(-1, -2)
        elif layout == "as it lies":
            b = normal(rng, *stack, I, J, dtype=dtype)
        else:  # as the filled slots of a cache are
            b = normal(rng, *stack, I + 3, J, dtype=dtype)[..., :I, :]
        got = product(a, b)
        assert got.shape == (*stack, M, J)
        assert got.dtype == dtype
        wide = np.longdouble
        want, size = a.astype(wide) @ b.astype(wide), abs(a).astype(wide) @ abs(b).astype(wide)
        # I products and I - 1 additions in any order are at most I roundings of a term, and one more to second order;
        # as many again for the expected value, on machines whose widest format is float64.
        assert np.all(np.abs(got - want) <= 2 * (I + 1) * unit(dtype) * size)


def test_every_part_is_computed_once_and_nothing_twice(monkeypatch):
    monkeypatch.setattr("refgemma.compute.threads._chosen", 3)
    for length in range(1, 40):
        for width in (1, 5, 40):
            for rows in (1, 3):
                for workers in (1, 2, 3):
                    monkeypatch.setattr(module, "_TILE", 20)
                    most = max(rows, module._TILE // width)
                    parts = module._cut(length, most, workers=workers)
                    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(length))
                    longest = max(part.stop - part.start for part in parts)
                    assert longest <= math.ceil(5 / 4 * most)
                    assert len(parts) <= workers * math.ceil(length / (workers * most))
