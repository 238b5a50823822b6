"""Bounds against float32 arithmetic at its worst and by chance, and against the mistakes they must not hide."""

import math

import numpy as np
import pytest

from refgemma.numerics import FLOAT32, PROFILES, from_bfloat16, to_bfloat16
from refgemma.ops.attention import attention_probs
from refgemma.ops.mlp import gelu
from refgemma.ops.norm import rms_norm
from refgemma.ops.rope import rope, rope_table
from refgemma.oracle.bounds import elementwise, products, sums
from refgemma.oracle.bounds.arithmetic import UNIT, arithmetic_of, confidence
from refgemma.oracle.bounds.slack import Known
from refgemma.oracle.thresholds import BRIDGED, LIBRARY

F32 = arithmetic_of("float32")
U = UNIT["float32"]


def single(x):
    return np.asarray(x, np.float32)


def wide(x):
    return np.asarray(x, np.float64)


def summed_one_by_one(addends):
    """Float32 sums along the last axis, each addition rounded, in the order given."""
    total = np.zeros(addends.shape[:-1], np.float32)
    for k in range(addends.shape[-1]):
        total = total + addends[..., k]
    return total


# ---- sums


def test_the_worst_order_of_a_sum_is_within_the_worst_case_and_an_added_unit_is_not():
    rng = np.random.default_rng(0)
    n = 300
    x, w = single(np.abs(rng.normal(size=(1, 200, n)))), single(np.abs(rng.normal(size=(1, n))))
    addends = np.sort(x * w, axis=-1)[..., ::-1]  # all positive, largest first: every addition rounds a large number
    exact = wide(x) @ wide(w).T
    bound = products.product(exact, Known(wide(x)), w, F32)
    error = np.abs(summed_one_by_one(addends)[..., None] - exact)
    assert np.all(error <= bound.worst)
    assert np.all(error <= bound.likely)  # sums that only grow are what chance is reckoned with, too
    assert np.all(np.abs(exact * (1 + 2 * n * U) - exact) > bound.worst)


def test_the_spread_of_sums_in_random_order_is_as_reckoned():
    rng = np.random.default_rng(1)
    n, orders = 200, 400
    for shift in (0.0, 3.0):  # sums that cancel, sums that grow
        x, w = single(rng.normal(size=n) + shift), single(rng.normal(size=n) + shift)
        exact = np.sum(wide(x) * wide(w))
        addends = np.stack([rng.permutation(x * w) for _ in range(orders)])
        spread = np.sqrt(np.mean(np.square(summed_one_by_one(addends) - exact)))
        sigma = math.sqrt(sums.chance_of_sum(exact, np.sum(np.square(wide(x) * wide(w))), n, U))
        # A rounding is spread over the whole interval and the unit is reached above a power of two alone: its standard
        # deviation is 1 / sqrt(3) of the bound times 0.5 to 1. Sums that cancel are given 1/2 where orders have 1/6 on
        # average: another 1 / sqrt(3) at most. Measured 0.30 and 0.31.
        assert 0.15 * sigma < spread < 0.6 * sigma


def test_a_product_is_judged_far_more_sharply_by_chance_than_in_the_worst_case():
    rng = np.random.default_rng(2)
    x, w = single(rng.normal(size=(1, 50, 2048))), single(rng.normal(size=(64, 2048)))
    exact = wide(x) @ wide(w).T
    bound = products.product(exact, Known(wide(x)), w, F32)
    error = np.abs(x @ w.T - exact)
    assert np.all(error <= bound.likely)
    assert np.median(bound.worst / bound.likely) > 10
    # x rounded to bfloat16 on the way (a tensor core's habit) is no chance, though no impossibility either.
    narrowed = np.abs(from_bfloat16(to_bfloat16(x)) @ w.T - exact)
    assert np.any(narrowed > bound.likely)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_magnitudes_are_taken_from_any_kind_of_weight(stored):
    from refgemma.numerics import Bfloat16Matrix
    from refgemma.ops.linear import Adapted, Delta

    rng = np.random.default_rng(3)
    w = single(rng.normal(size=(30, 20)))
    w = from_bfloat16(to_bfloat16(w))
    base = Bfloat16Matrix(to_bfloat16(w)) if stored == "bfloat16" else w
    x = np.abs(rng.normal(size=(2, 3, 20)))
    (linear,), (square,) = products.against(base, [x], [x])
    np.testing.assert_allclose(linear, x @ np.abs(wide(w)).T, rtol=1e-12)
    np.testing.assert_allclose(square, x @ np.square(wide(w)).T, rtol=1e-12)
    a, b = single(rng.normal(size=(4, 20))), single(rng.normal(size=(30, 4)))
    (adapted,), _ = products.against(Adapted(base, (Delta(a=a, b=b, scale=-2.0),)), [x], [])
    np.testing.assert_allclose(adapted, x @ (np.abs(wide(w)) + 2 * np.abs(wide(b)) @ np.abs(wide(a))).T, rtol=1e-12)


def test_norms_of_every_order_and_the_mistakes_in_them():
    rng = np.random.default_rng(4)
    D = 60
    x, weight = single(rng.normal(size=(1, 400, D))), single(rng.normal(size=D) * 0.4)
    x[0, ::4] *= single(1e-3)  # quiet ones, where eps counts
    exact = rms_norm(wide(x), wide(weight), eps=1e-6, numerics=PROFILES["float64"])
    bound = sums.norm(exact, Known(wide(x)), weight, 1e-6, F32)

    def norm(square_sum, root=lambda m: 1 / np.sqrt(m), eps=1e-6):
        return x * root(square_sum[..., None] / single(D) + single(eps)) * (1 + weight)

    square = np.square(x)
    for ordered in (square, np.sort(square, axis=-1), np.sort(square, axis=-1)[..., ::-1]):
        error = np.abs(norm(summed_one_by_one(ordered)) - exact)
        assert np.all(error <= bound.likely)
    wrong = {
        "eps outside": x / (np.sqrt(square.mean(-1, keepdims=True)) + single(1e-6)) * (1 + weight),
        "eps 1e-5": norm(square.sum(-1), eps=1e-5),
        "gain in bfloat16": norm(square.sum(-1)) / (1 + weight) * from_bfloat16(to_bfloat16(1 + weight)),
        "mean in bfloat16": norm(wide(from_bfloat16(to_bfloat16(single(square.mean(-1))))) * D),
    }
    for name, value in wrong.items():
        assert np.any(np.abs(value - exact) > bound.worst), name


# ---- curves


def ulps(got, exact):
    """Error in units in the last place of the exact value."""
    return np.abs(wide(got) - exact) / np.spacing(np.abs(single(exact))).astype(np.float64)


def test_numpy_s_own_curves_are_within_the_allowance_for_libraries():
    rng = np.random.default_rng(5)
    depth = single(-rng.uniform(0, 80, size=500_000))
    narrow = single(rng.normal(size=500_000) * 3)
    angle = single(rng.uniform(0, 8192, size=500_000))
    worst = {
        "exp": ulps(np.exp(depth), np.exp(wide(depth))).max(),
        "tanh": ulps(np.tanh(narrow), np.tanh(wide(narrow))).max(),
        "cos": ulps(np.cos(angle), np.cos(wide(angle))).max(),
        "sin": ulps(np.sin(angle), np.sin(wide(angle))).max(),
    }
    assert max(worst.values()) <= LIBRARY, worst


@pytest.mark.parametrize("H", [16, 24, 256])
def test_rotation_contains_both_ways_to_form_an_angle_in_float32(H):
    """D3: position times a rounded frequency, or over a rounded timescale; up to position 131071."""
    rng = np.random.default_rng(H)
    positions = np.concatenate([np.arange(300), rng.integers(300, 8192, 200), rng.integers(8192, 131072, 200)])[None]
    x = single(rng.normal(size=(1, positions.shape[1], 2, H)))
    exact = rope(wide(x), *rope_table(positions, H, 1e4, numerics=PROFILES["float64"]), numerics=PROFILES["float64"])
    bound = elementwise.rotation(exact, Known(wide(x)), positions, 1e4, F32)
    timescale = single(1e4) ** (single(np.arange(0, H, 2)) / single(H))
    at = single(positions)[..., None]
    logarithm = np.exp(single(np.arange(0, H, 2) / H) * single(-math.log(1e4)))  # frequencies by an exponential
    for angle in (at * (1 / timescale), at / timescale, at * logarithm):
        error = np.abs(rope(x, np.cos(angle), np.sin(angle)) - exact)
        assert np.all(error <= bound.worst)
        far = positions[0] > 8192
        assert error[:, far].max() > 50 * error[:, :300].max()  # it is there, and grows
        assert np.all(np.max(bound.worst[:, far], axis=(1, 2, 3)) < 0.6)  # and the bound still says something
    narrow = {"positions": single(from_bfloat16(to_bfloat16(at))), "frequencies": at}
    for name, at_what in narrow.items():
        frequency = 1 / timescale
        frequency = from_bfloat16(to_bfloat16(frequency)) if name == "frequencies" else frequency
        angle = at_what * frequency
        assert np.any(np.abs(rope(x, np.cos(angle), np.sin(angle)) - exact) > bound.worst), name


def test_softmax():
    rng = np.random.default_rng(6)
    allowed = np.tril(np.ones((40, 40), bool))[None]
    scores = single(rng.normal(size=(1, 3, 40, 40)) * 10)
    exact = attention_probs(wide(scores), allowed, numerics=PROFILES["float64"])
    bound = sums.softmax(exact, Known(wide(scores)), allowed, F32)
    assert np.all(np.abs(attention_probs(scores, allowed) - exact) <= bound.worst)
    masked = np.where(allowed[:, None], scores, single(-np.inf))
    powers = np.exp2((masked - masked.max(axis=-1, keepdims=True)) * single(1 / math.log(2)))
    assert np.all(np.abs(powers * (1 / powers.sum(-1, keepdims=True)) - exact) <= bound.worst)  # flash attention's way
    rounded = from_bfloat16(to_bfloat16(scores))
    assert np.any(np.abs(attention_probs(rounded, allowed) - exact) > bound.worst)
    # Scores known up to a slack: whatever they are within it, the bound holds. Large ones, too, where it is not linear.
    for slack in (1e-3, 0.5):
        loose = sums.softmax(exact, Known(wide(scores), np.full(scores.shape, slack), 0.0), allowed, F32)
        moved = wide(scores) + slack * rng.choice([-1, 1], size=scores.shape)
        error = np.abs(attention_probs(moved, allowed, numerics=PROFILES["float64"]) - exact)
        assert np.all(error <= exact * np.expm1(2 * slack) + 1e-12)
        assert np.all(loose.worst >= bound.worst)


def test_gelu_of_every_bfloat16_number():
    bits = np.arange(2**16, dtype=np.uint32)
    x = (bits << 16).view(np.float32)
    x = x[np.abs(x) < 1e4][None, None]
    exact = gelu(wide(x), numerics=PROFILES["float64"])
    bound = elementwise.gelu(exact, Known(wide(x)), F32)
    sigmoid = x / (1 + np.exp(np.minimum(-2 * single(math.sqrt(2 / math.pi)) * (x + single(0.044715) * x * x * x), 88)))
    for theirs in (gelu(x, numerics=FLOAT32), sigmoid):
        assert np.all(np.abs(theirs - exact) <= bound.worst)
    erf = 0.5 * wide(x) * (1 + np.vectorize(math.erf)(wide(x) / math.sqrt(2)))
    wrong = np.abs(erf - exact) > bound.worst
    assert wrong[np.abs(np.abs(x) - 2.7) < 0.1].all()
    assert not wrong[np.abs(x) < 2.0**-8].any()  # there the two are the same


# ---- tensors that were not given


def test_what_is_bridged_is_allowed_for():
    rng = np.random.default_rng(7)
    x, w = rng.normal(size=(1, 30, 50)), rng.normal(size=(40, 50))
    exact = x @ w.T
    slack = 1e-3 * np.abs(x)
    given = products.product(exact, Known(x), w, F32)
    bridged = products.product(exact, Known(x, slack, np.square(slack)), w, F32)
    moved = (x + rng.uniform(-1, 1, size=x.shape) * slack) @ w.T
    error = np.abs(moved - exact)
    assert np.any(error > given.worst)
    assert np.all(error <= bridged.likely)
    # By chance: the root of a sum of squares, seven times or so; not the sum of magnitudes.
    assert np.all(bridged.worst <= BRIDGED * bridged.likely * (1 + 1e-12))
    sigma = np.sqrt(np.square(slack) @ np.square(w).T)
    assert np.all(bridged.likely <= 1.01 * confidence(exact.size) * sigma)
    conspiring = (x + np.sign(w[0]) * slack) @ w.T
    assert np.all(np.abs(conspiring - exact)[..., 0] <= np.sum(np.abs(w[0]) * slack, axis=-1) * (1 + 1e-9))


@pytest.mark.parametrize("name", ["float32", "bf16-transformers", "bf16-deepmind", "float16"])
def test_slack_never_makes_a_bound_smaller(name):
    a, rng = arithmetic_of(name), np.random.default_rng(8)
    x = rng.normal(size=(1, 4, 2, 12))
    flat = x.reshape(1, 4, 24)
    up = rng.normal(size=flat.shape)
    positions = np.arange(4)[None]
    allowed = np.tril(np.ones((4, 4), bool))[None]
    scores = rng.normal(size=(1, 2, 4, 4))
    p64 = PROFILES["float64"]
    turned = rope(x, *rope_table(positions, 12, 1e4, numerics=p64), numerics=p64)
    cases = [
        (lambda k: sums.norm(rms_norm(flat, up[0, 0], eps=1e-6, numerics=p64), k, up[0, 0], 1e-6, a), flat),
        (lambda k: elementwise.added(flat + up, k, Known(up), "out", a), flat),
        (lambda k: products.product(flat @ flat[0].T, k, flat[0], a), flat),
        (lambda k: elementwise.rotation(turned, k, positions, 1e4, a), x),
        (lambda k: sums.softmax(attention_probs(scores, allowed, numerics=p64), k, allowed, a), scores),
        (lambda k: elementwise.gelu(gelu(flat, numerics=p64), k, a), flat),
        (lambda k: elementwise.gated(flat * up, k, Known(up), a), flat),
    ]
    for bound_of, value in cases:
        exact = bound_of(Known(value))
        size = np.full(value.shape, 1e-2)
        loose = bound_of(Known(value, size, np.square(size)))
        assert np.all(exact.likely <= exact.worst)
        assert np.all(loose.worst >= exact.worst)
        assert np.all(loose.likely >= exact.likely * (1 - 1e-12))
        assert np.all(loose.variance >= exact.variance)
        assert np.isfinite(loose.worst).all()
        assert loose.reason


def test_slack_of_a_norm_is_what_its_input_can_do():
    """One number up and all others towards zero, as far as each may be off: the most that one output grows."""
    rng = np.random.default_rng(0)
    x, weight, worst = rng.normal(size=(1, 1, 8)), rng.normal(size=8), 1e-4 * rng.uniform(size=(1, 1, 8))
    y = rms_norm(x, weight, eps=1e-6, numerics=PROFILES["float64"])
    plain, slack = (sums.norm(y, known, weight, 1e-6, F32).worst for known in (Known(x), Known(x, worst, worst**2)))
    for i in range(8):
        away = -np.sign(x)
        away[..., i] *= -1
        moved = np.abs(rms_norm(x + away * worst, weight, eps=1e-6, numerics=PROFILES["float64"]) - y)[0, 0, i]
        # Of first order, so all of it is granted but some parts in 1e4, and no more than as much again.
        assert moved * (1 - 1e-3) <= (slack - plain)[0, 0, i] <= 2 * moved


def test_slack_of_gelu_is_what_its_input_can_do():
    """Far off, the curve bends: the slope alone does not tell."""
    x = np.linspace(-6, 6, 241)
    for off in (1e-3, 0.3, 1.0):
        plain, slack = (
            elementwise.gelu(gelu(x, numerics=PROFILES["float64"]), known, F32).worst
            for known in (Known(x), Known(x, np.full_like(x, off), np.full_like(x, off**2)))
        )
        moved = np.maximum(
            *(
                np.abs(gelu(x + step, numerics=PROFILES["float64"]) - gelu(x, numerics=PROFILES["float64"]))
                for step in (off, -off)
            )
        )
        assert (moved <= slack - plain + 1e-12).all()
        assert (slack - plain).max() <= 1.5 * moved.max()
