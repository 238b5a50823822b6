"""Rotary embedding against cosines and sines of exact angles; other lanes and rounded positions are rejected."""

import math

import numpy as np
import pytest

from refgemma.numerics import FLOAT32, FLOAT64, Numerics
from refgemma.ops.rope import rope, rope_table

OPERATIONS = ("rope", "rope_table")
pytestmark = pytest.mark.usefixtures("on_each_library")

H, THETA = 12, 10_000.0
POSITIONS = np.array([[-1, 0, 1, 2, 257, 8191], [0, 5, 6, 7, 300, 1023]])
BOTH = pytest.mark.parametrize("numerics", [FLOAT32, FLOAT64], ids=lambda n: n.name)


def angles(positions):
    return np.array([[[int(p) * THETA ** (-2 * i / H) for i in range(H // 2)] for p in row] for row in positions])


def table_bound(numerics):
    # One rounding of the result. The angle, up to 8191, has been through a power, a quotient and a product in float64,
    # here and in the formula by hand: less than 16 units of 2**-53 each.
    return np.finfo(numerics.dtype).eps / 2 + 2 * 16 * 2.0**-53 * np.abs(angles(POSITIONS)) + 2.0**-52


@BOTH
def test_table_is_within_its_rounding_bound(numerics):
    cos, sin = rope_table(POSITIONS, H, THETA, numerics=numerics)
    assert cos.dtype == sin.dtype == numerics.dtype
    assert cos.shape == sin.shape == (2, 6, H // 2)
    assert np.all(np.abs(cos - np.vectorize(math.cos)(angles(POSITIONS))) <= table_bound(numerics))
    assert np.all(np.abs(sin - np.vectorize(math.sin)(angles(POSITIONS))) <= table_bound(numerics))


@BOTH
def test_table_rejects_known_bugs(numerics):
    cos, _ = rope_table(POSITIONS, H, THETA, numerics=numerics)
    narrow_position = np.array([[round_to_8_bits(p) for p in row] for row in POSITIONS])
    float32_angle = POSITIONS[..., None].astype(np.float32) * np.array(
        [THETA ** (-2 * i / H) for i in range(H // 2)], dtype=np.float32
    )
    exponent_of_all_lanes = np.array([THETA ** (-i / H) for i in range(H // 2)]) * POSITIONS[..., None]
    for mistaken in (
        angles(narrow_position),  # D2: 257 -> 256, 8191 -> 8192
        float32_angle,  # half an ulp of 8191 is 2.4e-4
        exponent_of_all_lanes,
    ):
        assert np.any(np.abs(cos - np.cos(mistaken.astype(np.float64))) > table_bound(numerics))


def round_to_8_bits(number):
    mantissa, exponent = math.frexp(int(number))
    return int(math.ldexp(round(mantissa * 256), exponent - 8))


def test_engines_with_float32_angles_are_imitated_by_rounding_points():
    points = {"rope.frequency": "float32", "rope.angle": "float32"}
    cos, _ = rope_table(POSITIONS, H, THETA, numerics=Numerics("test", np.dtype(np.float32), points))
    frequency = np.array([THETA ** (-2 * i / H) for i in range(H // 2)], dtype=np.float32)
    by_hand = np.cos((POSITIONS[..., None].astype(np.float32) * frequency).astype(np.float64))
    # The frequency is rounded from a float64 that may be a unit off: at a border that is one float32 step of the angle.
    step = 8191 * 2.0**-23
    assert np.abs(cos - by_hand).max() <= step
    assert np.mean(np.abs(cos - by_hand) <= 2.0**-24) > 0.9
    off = np.abs(angles(np.array([[8191]])) - (np.float32(8191) * frequency).astype(np.float64)).max()
    assert off <= 5e-4  # as the docstring says


def turned_by_hand(x, positions):
    """Each pair (i, i + H/2) is a complex number, turned by its angle."""
    out = np.empty(x.shape)
    for b, t, n in np.ndindex(x.shape[:3]):
        for i in range(H // 2):
            first, second = float(x[b, t, n, i]), float(x[b, t, n, i + H // 2])
            angle = int(positions[b, t]) * THETA ** (-2 * i / H)
            out[b, t, n, i] = first * math.cos(angle) - second * math.sin(angle)
            out[b, t, n, i + H // 2] = second * math.cos(angle) + first * math.sin(angle)
    return out


def example(numerics):
    x = np.random.default_rng(3).normal(size=(2, 6, 3, H)).astype(numerics.dtype)
    return x, rope_table(POSITIONS, H, THETA, numerics=numerics)


def turn_bound(x, numerics):
    # Table, product and sum: three roundings of |first| + |second|; and the error of the angle, as in `table_bound`.
    size = np.abs(x) + np.abs(np.roll(x, H // 2, axis=-1))
    per_lane = table_bound(numerics) + 2 * np.finfo(numerics.dtype).eps / 2 + 4 * 2.0**-53
    return np.tile(per_lane, 2)[:, :, None] * size


@BOTH
def test_rope_is_within_its_rounding_bound(numerics):
    x, (cos, sin) = example(numerics)
    before = x.copy()
    got = rope(x, cos, sin, numerics=numerics)
    assert got.dtype == numerics.dtype
    assert np.all(np.abs(got - turned_by_hand(x, POSITIONS)) <= turn_bound(x, numerics))
    assert np.array_equal(x, before)


@BOTH
def test_rope_rejects_known_bugs(numerics):
    x, (cos, sin) = example(numerics)
    got, bound = rope(x, cos, sin, numerics=numerics), turn_bound(x, numerics)
    deal = np.arange(H).reshape(H // 2, 2).T.ravel()  # 0 2 4 ... 1 3 5 ...: neighbours become halves
    neighbours = turned_by_hand(x[..., deal], POSITIONS)[..., deal.argsort()]
    backwards = turned_by_hand(x, -POSITIONS)
    of_the_column = turned_by_hand(x, np.tile(np.arange(6), (2, 1)))
    for mistaken in (neighbours, backwards, of_the_column):  # D7, the other sense of rotation, D9
        assert np.any(np.abs(got - mistaken) > bound)


@BOTH
def test_position_zero_turns_nothing_and_lengths_are_kept(numerics):
    x, (cos, sin) = example(numerics)
    got = rope(x, cos, sin, numerics=numerics)
    assert np.array_equal(got[POSITIONS == 0], x[POSITIONS == 0])
    length = np.linalg.norm(x.astype(np.float64), axis=-1)
    # Each lane is off by at most the bound of one lane, so the length by that of the vector of all lanes.
    slack = np.linalg.norm(turn_bound(x, numerics), axis=-1)
    assert np.all(np.abs(np.linalg.norm(got.astype(np.float64), axis=-1) - length) <= slack)


def test_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(4)
    q, k = rng.normal(size=(2, 1, 1, 1, H))

    def product(query_position, key_position):
        turned = [
            rope(x, *rope_table(np.array([[p]]), H, THETA, numerics=FLOAT64), numerics=FLOAT64)
            for x, p in ((q, query_position), (k, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    size = float(np.linalg.norm(q) * np.linalg.norm(k))
    for start in (0, 1, 77, 7000):
        # Angles of up to 7009, good to 16 units of 2**-53 each, and a sum of H terms.
        assert abs(product(start + 9, start) - product(9, 0)) <= (2 * 16 * (start + 9) + 8 * H) * 2.0**-53 * size
        assert abs(product(start + 8, start) - product(9, 0)) > 1e-3 * size
