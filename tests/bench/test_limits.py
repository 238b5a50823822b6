"""What the limits compute is what they are said to time."""

import numpy as np
import pytest

from refgemma.bench.limits import products, tile_loop, tiled
from refgemma.numerics import from_bfloat16, to_bfloat16
from tests.ops.weights import use_threads


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    use_threads(monkeypatch, 3)


@pytest.mark.parametrize("tile", [1, 4, 12, 28, 40, 999])
def test_a_shared_product_is_the_whole_product(tile):
    w = np.arange(40, dtype=np.float32).reshape(10, 4)
    for x in (np.array([1, 2, 3, 5], np.float32), np.arange(8, dtype=np.float32).reshape(4, 2)):
        # Whole numbers below 2**24: exact in any order.
        for way in (tiled(w, x, tile), *products(w, x)):
            assert way().tolist() == (w.astype(int) @ x.astype(int)).tolist()


def test_the_tile_loop_multiplies_every_matrix_whole():
    rng = np.random.default_rng(5)
    shapes = [(50, 24), (7, 24), (30, 60)]
    matrices = [to_bfloat16(rng.standard_normal(shape, np.float32)) for shape in shapes]
    for w in matrices:
        # The vectors are the loop's own secret: the product with the identity tells them.
        width = w.shape[1]
        unit = to_bfloat16(np.eye(width, dtype=np.float32))
        x = np.concatenate(tile_loop([unit], 100)())
        got = np.concatenate(tile_loop([w], 100)())
        terms = from_bfloat16(w).astype(np.float64) * x
        # One rounding a product and one a sum, to first order: I roundings of at most the sum of magnitudes.
        bound = width * np.finfo(np.float32).eps / 2 * np.abs(terms).sum(axis=1)
        assert (np.abs(got - terms.sum(axis=1)) <= bound).all()
        swapped = from_bfloat16(w).astype(np.float64) * x.reshape(-1, 2)[:, ::-1].ravel()  # odd for even
        assert (np.abs(got - swapped.sum(axis=1)) > bound).any()
    tiles = tile_loop(matrices, 100)()
    assert sum(map(len, tiles)) == 50 + 7 + 30
