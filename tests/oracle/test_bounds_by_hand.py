"""Each bound against the count of its roundings, made by hand: too loose is as wrong as too tight.

Where nothing but the worst case of so many roundings is claimed, the bound is compared with it within `NEAR`: what
compounds is of second order, n u below 1e-3 here.
"""

import math

import numpy as np
import pytest

from refgemma.numerics import PROFILES
from refgemma.ops.attention import attention_probs
from refgemma.ops.mlp import gelu
from refgemma.ops.norm import rms_norm
from refgemma.oracle.bounds import elementwise, products, sums
from refgemma.oracle.bounds.arithmetic import UNIT, arithmetic_of, confidence
from refgemma.oracle.bounds.slack import Known
from refgemma.oracle.thresholds import DRIFTED, SEEDS
from tests.oracle.test_bounds import single, summed_one_by_one, wide

F32, P64 = arithmetic_of("float32"), PROFILES["float64"]
U = UNIT["float32"]
NEAR = 2e-3


def test_chance_of_a_sum():
    """The parts one by one, in units where u = 1."""
    n = 12
    # Nothing but the straight line from 0 to s: sum of (k s / n)**2 over k = s**2 (n/3 + 1/2 + 1/(6n)) -> n s**2 / 3.
    line = sum((k * 6.0 / 1000) ** 2 for k in range(1, 1001)) / 1000
    assert sums.chance_of_sum(6.0, 0.0, n, 1.0) == pytest.approx(n * line, rel=2e-3)
    # Nothing but the bridge: n q**2 / 2, 96 of 100 orders are below; and one rounding of each product, q**2.
    assert sums.chance_of_sum(0.0, 4.0, n, 1.0) == pytest.approx((n / 2 + 1) * 4.0)
    # The two are added, since the line and the bridge are independent; and the unit is squared.
    assert sums.chance_of_sum(6.0, 4.0, n, 0.5) == pytest.approx(0.25 * (12 * (12 + 2) + 4))


def test_the_bridge_of_sums_in_random_order():
    """Of 100 orders of addends that cancel, 96 have partial sums whose squares add up to less than n q**2 / 2."""
    rng = np.random.default_rng(0)
    n, orders = 300, 4000
    x = rng.normal(size=n)
    x -= x.mean()
    squares = np.array([np.sum(np.square(np.cumsum(rng.permutation(x)))) for _ in range(orders)])
    share = np.mean(squares < n * np.sum(np.square(x)) / 2)
    # Cramer and von Mises: 0.9609. Four standard deviations of 4000 orders are 0.012.
    assert abs(share - 0.961) < 0.013


def test_a_product_is_n_roundings():
    rng = np.random.default_rng(1)
    for n in (7, 512):
        x, w = rng.normal(size=(1, 3, n)), rng.normal(size=(5, n))
        bound = products.product(x @ w.T, Known(x), w, F32)
        np.testing.assert_allclose(bound.worst, n * U * np.abs(x) @ np.abs(w).T, rtol=NEAR)
        s, q2 = x @ w.T, np.square(x) @ np.square(w).T
        chance = confidence(15) * U * np.sqrt(n * (np.square(s) / 3 + q2 / 2) + q2)
        np.testing.assert_allclose(bound.likely, np.minimum(chance, bound.worst), rtol=NEAR)


def test_scores_are_the_roundings_of_a_head_and_two():
    """H products and H - 1 additions make H roundings in a row; then the scale and its product."""
    rng = np.random.default_rng(2)
    H = 24
    q, k = rng.normal(size=(1, 5, 4, H)), rng.normal(size=(1, 5, 2, H))
    keys = np.repeat(k, 2, axis=2)  # head n reads key head n // 2
    exact = np.einsum("btnh,bsnh->bnts", q, keys) * 0.3
    bound = products.scores(exact, Known(q), Known(k), 0.3, F32)
    magnitude = np.einsum("btnh,bsnh->bnts", np.abs(q), np.abs(keys)) * 0.3
    np.testing.assert_allclose(bound.worst, (H + 2) * U * magnitude, rtol=NEAR)


def test_a_mix_has_the_roundings_of_the_keys_that_its_own_query_sees():
    rng = np.random.default_rng(3)
    T = 40
    allowed = np.tril(np.ones((T, T), bool))[None]
    probs = attention_probs(rng.normal(size=(1, 2, T, T)), allowed, numerics=P64)
    v = rng.normal(size=(1, T, 1, 6))
    exact = np.einsum("bnts,bsh->btnh", probs, v[:, :, 0])
    bound = products.mix(exact, Known(probs), Known(v), allowed.sum(-1), F32)
    magnitude = np.einsum("bnts,bsh->btnh", probs, np.abs(v[:, :, 0]))
    seen = np.arange(1, T + 1)[None, :, None, None]
    np.testing.assert_allclose(bound.worst, seen * U * magnitude, rtol=NEAR)  # 1 for the first query, 40 for the last


@pytest.mark.parametrize("D", [16, 3072])
def test_a_norm_is_half_the_roundings_of_its_sum_and_eight(D):
    rng = np.random.default_rng(D)
    x, weight = rng.normal(size=(1, 4, D)), rng.normal(size=D) * 0.3
    exact = rms_norm(x, weight, eps=1e-6, numerics=P64)
    bound = sums.norm(exact, Known(x), weight, 1e-6, F32)
    # Under the root, which halves: D squares and D - 1 additions make D in a row, the division, eps. Then seven.
    want = ((D + 3) / 2 + 7) * U * np.abs(exact)
    np.testing.assert_allclose(bound.worst, want, rtol=5 * NEAR)
    # By chance: with s the sum of squares and q**2 that of their squares, three for a normal distribution.
    s, q2 = np.square(x).sum(-1, keepdims=True), np.square(np.square(x)).sum(-1, keepdims=True)
    root = np.sqrt(D * (1 / 3 + q2 / np.square(s) / 2) + q2 / np.square(s) + 2) / 2
    ulp = 2 * U * s  # squares below it may vanish, if they come last: a tenth on top where there are 3072
    vanishing = np.where(np.square(x) < ulp, np.minimum(np.square(x), ulp / 2), 0).sum(-1, keepdims=True) / s / 2
    assert np.all(vanishing <= 0.2 * confidence(4 * D) * root * U)
    likely = ((7 + confidence(4 * D) * root) * U + vanishing) * np.abs(exact)
    np.testing.assert_allclose(bound.likely, np.minimum(likely, bound.worst), rtol=5 * NEAR)


def test_a_residual_add_is_one_rounding():
    x, change = np.full((1, 1, 3), 1.0), np.array([[[2.0, -3.0, 0.5]]])
    bound = elementwise.added(x + change, Known(x), Known(change), "out", F32)
    np.testing.assert_allclose(bound.worst, U * np.abs(x + change), rtol=1e-12)
    np.testing.assert_allclose(bound.likely, bound.worst, rtol=1e-12)
    narrow = elementwise.added(x + change, Known(x), Known(change), "out", arithmetic_of("bfloat16"))
    np.testing.assert_allclose(narrow.worst, UNIT["bfloat16"] * np.abs(x + change), rtol=5e-3)
    # It is reached: 1 + 2**-24 is rounded to 1 (to even), by u.
    assert float(single(1) + single(U)) - (1 + U) == -U


def test_a_gated_product_is_one_rounding():
    act, up = np.array([[[1.5, -2.0]]]), np.array([[[0.3, 7.0]]])
    bound = elementwise.gated(act * up, Known(act), Known(up), F32)
    np.testing.assert_allclose(bound.worst, U * np.abs(act * up), rtol=1e-12)


def test_a_softmax_has_three_roundings_of_each_argument():
    """Two keys, the other one d below the first. Its exponential: 3 d for the argument, 8 for the library; so has the

    other; the sum has two addends: 2; the division: 2. The first probability is nearly one: what the second is off by
    it is off by times p.
    """
    for d in (10.0, 60.0):
        scores = np.array([0.0, -d]).reshape(1, 1, 1, 2)
        allowed = np.ones((1, 1, 2), bool)
        exact = attention_probs(scores, allowed, numerics=P64)
        bound = sums.softmax(exact, Known(scores), allowed, F32)
        relative = bound.worst / (exact * U)
        assert relative[0, 0, 0, 1] == pytest.approx(3 * d + 8 + 8 + 2 + 2, rel=NEAR)
        assert relative[0, 0, 0, 0] == pytest.approx(8 + 8 + 2 + 2, rel=5e-3)


def test_a_sum_in_softmax_grows_with_the_keys():
    """n keys alike: no argument to round, so 8 and 8 for two exponentials, n for the sum and 2 for the division."""
    for n in (4, 1000):
        scores, allowed = np.zeros((1, 1, 1, n)), np.ones((1, 1, n), bool)
        exact = np.full(scores.shape, 1 / n)
        bound = sums.softmax(exact, Known(scores), allowed, F32)
        np.testing.assert_allclose(bound.worst, (16 + n + 2) * U / n, rtol=NEAR)
        chance = confidence(n) * math.sqrt(n / 3 + (n / 2 + 1) / n)
        np.testing.assert_allclose(bound.likely, min(18 + chance, 18 + n) * U / n, rtol=NEAR)


def test_what_a_division_divides_is_off_already():
    """The factor 1 + firm: where an argument is worth a part in thirty, so is what the sum adds to it."""
    a = arithmetic_of("bf16-deepmind")
    assert {"attn.shifted", "attn.exp", "attn.probs"} <= a.points
    n = 4000
    scores = np.concatenate([[0.0], np.full(n - 1, -9.0)]).reshape(1, 1, 1, n)
    allowed = np.ones((1, 1, n), bool)
    exact = attention_probs(scores, allowed, numerics=P64)
    bound = sums.softmax(exact, Known(scores), allowed, a)
    own = 9.0 * (3 * a.unit + a.at("attn.shifted")) + 8 * a.unit + a.at("attn.exp")
    first = 8 * a.unit + a.at("attn.exp")
    factor = math.exp(own) * float(np.sum(exact * np.exp([first] + [own] * (n - 1))))
    summed = 2 * a.unit + a.at("attn.total") + n * a.unit / (1 - n * a.unit)
    want = factor * (1 + summed) * (1 + a.at("attn.probs")) - 1
    # Without it the sum's n u, 2.4e-4, would lack its own part in thirty.
    assert bound.worst[0, 0, 0, 1] / exact[0, 0, 0, 1] == pytest.approx(want, rel=1e-6)


def test_gelu_on_its_straight_side():
    """Far to the right 1 + tanh is 2 and flat: the library's 8 halved, its sum's, two products. Left to none: 0."""
    x = np.array([[[20.0]]])
    bound = elementwise.gelu(gelu(x, numerics=P64), Known(x), F32)
    assert bound.worst[0, 0, 0] == pytest.approx((8 / 2 + 1 + 2) * U * 20, rel=NEAR)


def test_lane_zero_of_a_rotation_has_no_angle_to_round():
    """Frequency one: p itself. Cosine and sine by the library (8), two products and a sum (2)."""
    x = np.ones((1, 1, 1, 8))
    positions = np.array([[700]])
    y = np.full((1, 1, 1, 8), 0.5)
    bound = elementwise.rotation(y, Known(x), positions, 1e4, F32)
    want = (8 + 2) * U * (abs(math.cos(700)) + abs(math.sin(700)))
    assert bound.worst[0, 0, 0, 0] == pytest.approx(want, rel=NEAR)
    assert bound.worst[0, 0, 0, 1] > 100 * want  # the next one is off by hundreds of units


def test_float16_underflows_by_half_its_smallest_number():
    """2**-24 is the smallest; numbers around 2**-25 go to it or to zero, and none is moved further than that."""
    a = arithmetic_of("float16")
    assert a.tiny == 2.0**-25
    x = np.linspace(-(2.0**-22), 2.0**-22, 100_001)
    off = np.abs(x.astype(np.float16).astype(np.float64) - x)
    assert 0.999 * a.tiny < off.max() <= a.tiny
    zero = Known(np.zeros((1, 1, 1)))
    assert elementwise.added(np.zeros((1, 1, 1)), zero, zero, "out", a).worst == a.tiny


# ---- sums with one large addend


@pytest.mark.parametrize("channel", [30.0, 300.0, 1000.0])
@pytest.mark.parametrize("D", [184, 3072])
def test_a_norm_with_a_massive_channel(D, channel):
    """Squares of the others are below the unit of the sum, which stands still however many are added."""
    rng = np.random.default_rng(0)
    x, weight = single(rng.normal(size=(1, 8, D)) * 0.15), single(rng.normal(size=D) * 0.3)
    x[..., 0] = channel
    exact = rms_norm(wide(x), wide(weight), eps=1e-6, numerics=P64)
    bound = sums.norm(exact, Known(wide(x)), weight, 1e-6, F32)
    mean = summed_one_by_one(x * x)[..., None] / single(D)
    error = np.abs(x * (1 / np.sqrt(mean + single(1e-6))) * (1 + weight) - exact)
    assert np.all(error <= bound.likely)
    # Two channels of that size, or four, are no other matter.
    x[..., 1] = -channel
    x[..., 2:4] = channel / 2
    exact = rms_norm(wide(x), wide(weight), eps=1e-6, numerics=P64)
    bound = sums.norm(exact, Known(wide(x)), weight, 1e-6, F32)
    mean = summed_one_by_one(x * x)[..., None] / single(D)
    assert np.all(np.abs(x * (1 / np.sqrt(mean + single(1e-6))) * (1 + weight) - exact) <= bound.likely)


@pytest.mark.parametrize("n", [256, 2048, 16384])
def test_a_product_with_one_large_addend_first(n):
    rng = np.random.default_rng(n)
    x = single(1e-4 * rng.uniform(0.5, 1.5, size=(1, 4, n)))
    x[..., 0] = 3000
    w = np.ones((2, n), np.float32)
    exact = wide(x) @ wide(w).T
    bound = products.product(exact, Known(wide(x)), w, F32)
    error = np.abs(summed_one_by_one(x)[..., None] - exact)
    assert np.all(error <= bound.likely)
    # Chance alone: what the roundings would add up to if they fell either way. It is exceeded, from 2048 on.
    chance = confidence(exact.size) * np.sqrt(sums.chance_of_sum(exact, np.square(wide(x)).sum(-1)[..., None], n, U))
    assert bool(np.all(error <= chance)) == (n < 2048)
    # Nothing is granted to sums of many addends of a size.
    plain = rng.normal(size=(1, 4, n))
    squares, magnitude = np.square(plain).sum(-1), np.abs(plain).sum(-1)
    assert np.all(sums.swallowed_by_one(magnitude, squares, n, U) == 0)


def test_a_softmax_of_very_many_unlikely_keys():
    """Each is worth less than the unit of the sum, which stays at the first; together they are a part in 2000."""
    n = 20_000
    scores = np.full((1, 1, 1, n), -17.5)
    scores[..., 0] = 0
    allowed = np.ones((1, 1, n), bool)
    exact = attention_probs(scores, allowed, numerics=P64)
    bound = sums.softmax(exact, Known(scores), allowed, F32)
    powers = np.exp(single(scores))
    error = np.abs(powers / summed_one_by_one(powers)[..., None] - exact)
    assert error[0, 0, 0, 0] > 4e-4  # it happens
    assert np.all(error <= bound.likely)
    assert bound.likely[0, 0, 0, 0] < 1.2 * error[0, 0, 0, 0]  # and more than happens is not granted


def test_what_is_swallowed():
    u = 2.0**-10
    large, small = 1.0, np.array([u / 4, u / 2, u, 1.9 * u, 3 * u])
    addends = np.concatenate([[large], small])
    # All but the last are below the spacing 2 u of numbers near one: the third and fourth may lose u at most.
    assert sums.swallowed(addends, u)[0] == pytest.approx(u / 4 + u / 2 + u + u, rel=0.02)
    assert sums.swallowed(np.ones(50), u)[0] == 0


# ---- measured budgets


def test_so_many_seeds_as_the_limit_makes_up_for():
    """The scatter of eight runs along one direction is off by `DRIFTED` once in a thousand, that of two once in ten.

    The mean square of n of them, times n over the variance, is chi squared with n degrees of freedom; that is below
    n / 9 with a probability which for even n is that of n / 2 or more events of a Poisson process of mean n / 18.
    """

    def missed(n):
        mean = n / DRIFTED**2 / 2
        return 1 - math.exp(-mean) * sum(mean**k / math.factorial(k) for k in range(n // 2))

    assert missed(2) == pytest.approx(0.105, abs=0.001)
    assert missed(len(SEEDS)) < 0.0012
