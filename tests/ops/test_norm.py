"""RMSNorm against its formula in Python floats with exact sums; every known wrong norm is rejected."""

import math

import numpy as np
import pytest

from refgemma.numerics import FLOAT32, FLOAT64, Numerics, from_bfloat16, to_bfloat16
from refgemma.ops.norm import rms_norm

OPERATIONS = ("rms_norm",)
pytestmark = pytest.mark.usefixtures("on_each_library")

D = 40
EPS = 1e-6
DTYPES = (np.float32, np.float64)


def rms_norm_by_hand(x, weight, eps=EPS, one=1.0, outside=0.0):
    """The formula; `one` and `outside` make the known wrong variants."""
    out = np.empty(x.shape)
    for i in np.ndindex(x.shape[:-1]):
        mean_square = math.fsum(float(v) ** 2 for v in x[i]) / x.shape[-1]
        rms = math.sqrt(mean_square + eps) + outside
        out[i] = [float(v) / rms * (one + float(g)) for v, g in zip(x[i], weight, strict=True)]
    return out


def example(dtype):
    """Activations (2, 3, D), one row so quiet that eps, and where it is added, changes the answer; and a weight."""
    rng = np.random.default_rng(7)
    x, weight = rng.normal(size=(2, 3, D)), rng.normal(size=D)
    x[0, 0] *= 1e-3
    return x.astype(dtype), weight.astype(dtype)


def bound(want, dtype):
    # D squares and additions under a root, then root, division, gain and product, with eps rounded, too: to first order
    # at most D / 2 + 6 half-ulps. The formula by hand, in float64 with an exact sum, has eight roundings of its own.
    return ((D / 2 + 6) * np.finfo(dtype).eps / 2 + 8 * 2**-53) * np.abs(want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_within_its_rounding_bound(dtype):
    x, weight = example(dtype)
    got, want = rms_norm(x, weight, eps=EPS), rms_norm_by_hand(x, weight)
    assert got.dtype == dtype
    assert got.shape == x.shape
    assert np.all(np.abs(got - want) <= bound(want, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "wrong",
    [{"one": 0.0}, {"one": 2.0}, {"eps": 0.0, "outside": EPS}, {"eps": 1e-5}, {"eps": 0.0}, {"eps": EPS * D}],
    ids=["B1: w", "B2: 2 + w", "B9: eps outside the root", "B9: eps = 1e-5", "no eps", "eps before the mean"],
)
def test_rms_norm_rejects_known_bugs(dtype, wrong):
    x, weight = example(dtype)
    got, mistaken = rms_norm(x, weight, eps=EPS), rms_norm_by_hand(x, weight, **wrong)
    assert np.any(np.abs(got - mistaken) > bound(mistaken, dtype))


def test_a_gain_formed_in_bfloat16_is_seen_and_is_a_rounding_point():
    """B5: it costs up to 0.4 %, so it is a profile's choice and not the default."""
    x, weight = example(np.float32)
    narrow = from_bfloat16(to_bfloat16(1 + weight))
    as_engine = rms_norm_by_hand(x, narrow - 1)
    assert np.any(np.abs(rms_norm(x, weight, eps=EPS) - as_engine) > bound(as_engine, np.float32))
    imitated = rms_norm(x, weight, eps=EPS, numerics=Numerics("B5", np.dtype(np.float32), {"norm.gain": "bfloat16"}))
    assert np.all(np.abs(imitated - as_engine) <= bound(as_engine, np.float32))


def test_narrowing_before_the_gain_is_another_rounding_point_than_after():
    """B4, the order of Llama, against Gemma's own, which narrows once, at the end."""
    x, weight = example(np.float32)

    def rounded_at(*points):
        return Numerics("test", np.dtype(np.float32), dict.fromkeys(points, "bfloat16"))

    plain = rms_norm(x, weight, eps=EPS)
    once = rms_norm(x, weight, eps=EPS, numerics=rounded_at("norm.out"))
    assert np.array_equal(once, from_bfloat16(to_bfloat16(plain)))
    llama = rms_norm(x, weight, eps=EPS, numerics=rounded_at("norm.normed", "norm.out"))
    ones = np.zeros_like(weight)  # a weight of zero is a gain of one
    normed = from_bfloat16(to_bfloat16(rms_norm(x, ones, eps=EPS)))
    assert np.array_equal(llama, from_bfloat16(to_bfloat16(normed * (1 + weight))))
    assert not np.array_equal(once, llama)


@pytest.mark.parametrize("numerics", [FLOAT32, FLOAT64], ids=lambda n: n.name)
def test_zeros_stay_zeros(numerics):
    out = rms_norm(np.zeros((1, 2, D), numerics.dtype), np.ones(D, numerics.dtype), eps=EPS, numerics=numerics)
    assert np.array_equal(out, np.zeros((1, 2, D)))


def test_each_vector_is_normalised_on_its_own_and_input_is_left_alone():
    x, weight = example(np.float64)
    before = x.copy()
    whole = rms_norm(x, weight, eps=EPS)
    alone = rms_norm(x[1:, 2:], weight, eps=EPS)
    assert np.array_equal(whole[1:, 2:], alone)
    assert np.array_equal(x, before)


@pytest.mark.parametrize("shape", [(D - 1,), (1,), (D, 1), (1, D), ()])
def test_a_weight_of_another_shape_is_one_clear_sentence(shape):
    with pytest.raises(ValueError, match=r"^weight has shape .*, x has 40 channels: expected \(40,\)$"):
        rms_norm(np.ones((2, D), np.float32), np.ones(shape, np.float32), eps=EPS)
