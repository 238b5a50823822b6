"""bfloat16 bit by bit against its definition, and rounding points that are all live."""

import math
from collections import Counter

import numpy as np
import pytest

from refgemma import numerics
from refgemma.model import forward
from refgemma.numerics import (
    FLOAT32,
    FLOAT64,
    PROFILES,
    ROUNDING_POINTS,
    Bfloat16Matrix,
    Numerics,
    from_bfloat16,
    namespace_of,
    to_bfloat16,
)
from tests.models import random_model, widened

OPERATIONS = ("forward", "from_bfloat16", "to_bfloat16")
pytestmark = pytest.mark.usefixtures("on_each_library")

EVERY = np.arange(2**16, dtype=np.uint16)


def bfloat16_by_hand(bits):
    """Value of 16 bits: a sign, 8 of exponent, 7 of mantissa; infinity as the number that would come next, 2**128."""
    sign = -1.0 if bits >> 15 else 1.0
    exponent, mantissa = (bits >> 7) & 0xFF, bits & 0x7F
    return sign * (math.ldexp(mantissa, -133) if exponent == 0 else math.ldexp(128 + mantissa, exponent - 134))


def is_nan(bits):
    return (bits & 0x7FFF) > 0x7F80


def test_from_bfloat16_writes_where_it_is_told_to():
    there = np.full((2, 65536), np.nan, np.float32)
    got = numerics.from_bfloat16(EVERY.reshape(1, -1), out=there[1:])  # of NumPy, whose memory can be looked at
    assert np.shares_memory(got, there)
    np.testing.assert_array_equal(there[1].view(np.uint32), EVERY.astype(np.uint32) << 16)
    assert np.isnan(there[0]).all()


def test_from_bfloat16_is_exact_for_every_number():
    wide = from_bfloat16(EVERY)
    assert wide.dtype == np.float32
    for bits, value in zip(EVERY.tolist(), wide.tolist(), strict=True):
        if is_nan(bits):
            assert math.isnan(value)
        elif bits & 0x7FFF == 0x7F80:
            assert value == math.copysign(math.inf, -1 if bits >> 15 else 1)
        else:
            assert value == bfloat16_by_hand(bits)
            assert math.copysign(1, value) == (-1 if bits >> 15 else 1)


def test_to_bfloat16_gives_back_every_number():
    back = to_bfloat16(from_bfloat16(EVERY))
    assert back.dtype == np.uint16
    numbers = ~np.isnan(from_bfloat16(EVERY))
    assert np.array_equal(back[numbers], EVERY[numbers])
    assert np.all(np.isnan(from_bfloat16(back[~numbers])))


def nearest_even(x, low):
    """Bits of the nearer of two neighbours, `low` and `low` + 1 (away from zero); the even one if both are as near."""
    below, above = abs(x - bfloat16_by_hand(low)), abs(bfloat16_by_hand(low + 1) - x)  # exact in float64
    return low if below < above or (below == above and low % 2 == 0) else low + 1


def test_to_bfloat16_rounds_to_nearest_even_around_every_midpoint():
    """Between each number and the next: halfway, one float32 to either side of it, and next to both ends."""
    for sign in (0x0000, 0x8000):
        low = np.arange(sign, sign + 0x7F80, dtype=np.uint32)  # the last of them has infinity as its neighbour
        for lower_half in (0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
            x = ((low << 16) | np.uint32(lower_half)).view(np.float32)
            want = [nearest_even(v, bits) for v, bits in zip(x.tolist(), low.tolist(), strict=True)]
            assert to_bfloat16(x).tolist() == want
    truncated = (x.view(np.uint32) >> 16).tolist()
    assert truncated != want  # it can fail: cutting off the lower half is seen


def test_to_bfloat16_breaks_ties_to_even():
    """1 + 1/256 lies between 1 and 1 + 1/128, 1 + 3/256 between that and 1 + 1/64: once down, once up."""
    x = np.array([1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256], np.float32)
    assert from_bfloat16(to_bfloat16(x)).tolist() == [1.0, 1 + 1 / 64, -1.0]


def test_every_nan_stays_a_nan():
    """A payload in the lower half alone would become infinity if it were cut off, and zero if it were rounded up."""
    payloads = np.array([1, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x400000, 0x7FFFFF], np.uint32)
    for sign in (0x7F800000, 0xFF800000):
        narrow = to_bfloat16((payloads | np.uint32(sign)).view(np.float32))
        assert all(is_nan(bits) for bits in narrow.tolist())
        assert np.all(narrow >> 15 == sign >> 31)


def test_shapes_and_scalars():
    assert to_bfloat16(np.ones((2, 0, 3), np.float32)).shape == (2, 0, 3)
    assert to_bfloat16(np.array(1.0, np.float32)).tolist() == 0x3F80
    assert from_bfloat16(np.array(0x3F80, np.uint16)).tolist() == 1.0
    strided = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2]
    assert np.array_equal(from_bfloat16(to_bfloat16(strided)), strided)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bfloat16_matrix_widens_rows(dtype):
    bits = np.random.default_rng(1).integers(0, 0x7F80, size=(5, 3)).astype(np.uint16)
    matrix = Bfloat16Matrix(bits)
    assert matrix.shape == (5, 3)
    assert matrix.nbytes == 30
    for index in (slice(1, 4), np.array([[4, 0], [0, 2]])):
        rows = matrix.rows(index, np.dtype(dtype))
        assert rows.dtype == dtype
        assert np.array_equal(rows, from_bfloat16(bits)[index])


# ---- rounding points


def logits(numerics, narrow=None, point=None):
    """Logits of a small model with at most one rounding point on."""
    model = random_model(2, num_tokens=6, num_layers=2, head_dim=24, query_scale=24**-0.5)  # 2 i / 24 is seldom exact
    params = widened(model.params) if numerics is FLOAT64 else model.params
    numerics = Numerics("test", numerics.dtype, {point: narrow} if point else {})
    quiet = np.flatnonzero(np.abs(model.params["embed"]).max(axis=1) < 0.1)  # where the digits of eps count
    tokens = np.where(np.arange(6) % 2, model.tokens, quiet[0])
    return forward(params, model.config, tokens, positions=model.positions, numerics=numerics)


@pytest.mark.parametrize(("numerics", "narrow"), [(FLOAT32, "bfloat16"), (FLOAT64, "bfloat16"), (FLOAT64, "float32")])
def test_every_rounding_point_is_live(numerics, narrow):
    plain = logits(numerics)
    for point in ROUNDING_POINTS:
        rounded = logits(numerics, narrow, point)
        assert rounded.dtype == numerics.dtype
        assert not np.array_equal(rounded, plain), point


@pytest.mark.parametrize("scaled", ["attn.query", "attn.product"])
def test_every_value_passes_its_points_once(monkeypatch, scaled):
    """All points are on, so that every step is taken; the scale comes before the product or after it, not both."""
    calls = Counter()
    monkeypatch.setattr(Numerics, "round", lambda self, point, value: (calls.update([point]), value)[1])
    other = {"attn.query": "attn.product", "attn.product": "attn.query"}[scaled]
    points = dict.fromkeys(ROUNDING_POINTS.keys() - {other}, "float32")
    model = random_model(2, num_tokens=6, num_layers=2)
    numerics = Numerics("test", np.dtype(np.float32), points)
    forward(model.params, model.config, model.tokens, positions=model.positions, numerics=numerics)
    L = 2
    norms = ["square", "mean", "eps", "shifted", "inverse", "normed", "gain", "out"]
    gelus = ["square", "cube", "term", "sum", "inner", "tanh", "shifted"]
    assert calls == {
        "embed.scale": 1,
        "embed": 1,
        **dict.fromkeys([f"norm.{step}" for step in norms], 2 * L + 1),
        "linear": 7 * L + 1,
        **dict.fromkeys(["rope.exponent", "rope.timescale", "rope.frequency", "rope.angle"], 1),
        "rope.table": 2,  # cosines and sines
        "rope.product": 2 * 4 * L,  # of queries and keys, two halves with two tables
        "rope.out": 2 * L,
        **dict.fromkeys(["attn.scale", scaled, "attn.scores", "attn.shifted", "attn.exp", "attn.total"], L),
        **dict.fromkeys(["attn.probs", "attn.mix", "attn.residual"], L),
        "gelu.constant": 2 * L,
        **dict.fromkeys([f"gelu.{step}" for step in gelus], L),
        **dict.fromkeys(["mlp.act", "mlp.gated", "out"], L),
    }
    assert calls.keys() | {other} == ROUNDING_POINTS.keys()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_gives_the_nearest_number_of_the_narrower_format(dtype):
    x = np.random.default_rng(2).normal(size=(3, 4)).astype(dtype)
    numerics = Numerics("test", np.dtype(dtype), {"embed": "bfloat16", "out": "float32"})
    for point, narrow in (("embed", from_bfloat16(to_bfloat16(x.astype(np.float32)))), ("out", x.astype(np.float32))):
        rounded = numerics.round(point, x)
        assert rounded.dtype == dtype
        assert np.array_equal(rounded, narrow)
    assert numerics.round("mlp.act", x) is x


def test_unknown_points_and_formats_are_one_clear_sentence():
    with pytest.raises(ValueError, match=r"^'attn.prob' is not a rounding point: expected one of embed.scale, embed, "):
        Numerics("test", np.dtype(np.float32), {"attn.prob": "bfloat16"})
    with pytest.raises(
        ValueError, match=r"^rounding point 'out' has format 'float16': expected 'bfloat16' or 'float32'$"
    ):
        Numerics("test", np.dtype(np.float32), {"out": "float16"})


def test_plain_profiles_round_nothing():
    assert PROFILES["float32"] is FLOAT32
    assert PROFILES["float64"] is FLOAT64
    x = np.array([1 / 3], np.float32)
    for point in ROUNDING_POINTS:
        assert FLOAT32.round(point, x) is x


def test_namespace_of_a_numpy_array_is_numpy():
    assert namespace_of(np.zeros(2)) is np
