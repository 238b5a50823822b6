"""Mask, scores, softmax and mix, each against plain loops; heads read in the wrong order are rejected, NaN is, too."""

import math

import numpy as np
import pytest

from refgemma.numerics import FLOAT32, FLOAT64, Numerics, from_bfloat16, to_bfloat16
from refgemma.ops.attention import allowed_keys, attention_mix, attention_probs, attention_scores

OPERATIONS = ("allowed_keys", "attention_mix", "attention_probs", "attention_scores")
pytestmark = pytest.mark.usefixtures("on_each_library")

B, T, S, N, K, H = 2, 3, 5, 6, 2, 8
G = N // K
SCALE = 0.3
BOTH = pytest.mark.parametrize("numerics", [FLOAT32, FLOAT64], ids=lambda n: n.name)


def units(numerics):
    """One rounding of ours, and one of the formula by hand, which is in float64."""
    return np.finfo(numerics.dtype).eps / 2 + 2.0**-53


# ---- who may see whom


def test_allowed_keys_are_the_real_ones_up_to_the_query():
    query = np.array([[4, 5, -1]])
    key = np.array([[-1, 3, 4, 5, 6, -1, 0]])
    assert allowed_keys(query, key).tolist() == [
        [
            [False, True, True, False, False, False, True],
            [False, True, True, True, False, False, True],
            [False] * 7,
        ]
    ]


def test_allowed_keys_are_a_matter_of_positions_not_of_slots():
    """A ring buffer holds its keys in any order."""
    rng = np.random.default_rng(1)
    query, key = np.array([[3, 4, 5], [-1, 0, 1]]), np.array([[0, 1, 2, 3, 4, 5], [-1, -1, -1, -1, 0, 1]])
    shuffled = rng.permutation(6)
    assert np.array_equal(allowed_keys(query, key[:, shuffled]), allowed_keys(query, key)[:, :, shuffled])
    by_hand = [[[0 <= k <= q for k in ks] for q in qs] for qs, ks in zip(query.tolist(), key.tolist(), strict=True)]
    assert allowed_keys(query, key).tolist() == by_hand
    assert allowed_keys(query, key)[0, 0].tolist() == [True, True, True, True, False, False]  # itself included


# ---- scores


def scores_by_hand(q, k, kv_head=lambda n: n // G, scale=SCALE):
    """Scores BNTS, and the same with all signs dropped; sums are exact."""
    want, size = np.empty((B, N, T, S)), np.empty((B, N, T, S))
    for b, n, t, s in np.ndindex(B, N, T, S):
        terms = [float(a) * float(c) * scale for a, c in zip(q[b, t, n], k[b, kv_head(n), s], strict=True)]
        want[b, n, t, s], size[b, n, t, s] = math.fsum(terms), math.fsum(map(abs, terms))
    return want, size


def example(numerics):
    rng = np.random.default_rng(2)
    q, k, v = rng.normal(size=(B, T, N, H)), rng.normal(size=(B, K, S, H)), rng.normal(size=(B, K, S, H))
    return [x.astype(numerics.dtype) for x in (q, k, v)]


@BOTH
def test_scores_are_within_their_rounding_bound(numerics):
    q, k, _ = example(numerics)
    before = q.copy()
    got = attention_scores(q, k, scale=SCALE, numerics=numerics)
    want, size = scores_by_hand(q, k)
    assert got.dtype == numerics.dtype
    # H products, H - 1 additions, the scale and its product; one to second order.
    bound = (H + 3) * units(numerics) * size
    assert np.all(np.abs(got - want) <= bound)
    assert np.array_equal(q, before)
    for mistaken, _ in (
        scores_by_hand(q, k, kv_head=lambda n: n % K),  # E6: repeat, not tile
        scores_by_hand(q, k, scale=SCALE**2),  # on both sides
        scores_by_hand(q, k, scale=1.0),
    ):
        assert np.any(np.abs(got - mistaken) > bound)


@pytest.mark.parametrize("heads", [(6, 6), (6, 1), (6, 3)], ids=["multi-head", "multi-query", "grouped"])
def test_query_heads_share_key_heads_in_order(heads):
    """Exactly: products of small whole numbers."""
    N, K = heads
    q = np.ones((1, 1, N, 2), np.float32)
    k = np.repeat(np.arange(K, dtype=np.float32), 2).reshape(1, K, 1, 2)
    scores = attention_scores(q, k, scale=0.5)[0, :, 0, 0]
    assert scores.tolist() == [n // (N // K) for n in range(N)]
    probs = np.ones((1, N, 1, 1), np.float32)
    assert attention_mix(probs, k)[0, 0, :, 0].tolist() == [n // (N // K) for n in range(N)]


# ---- softmax


def allowed_example():
    """Some queries see all keys, some a few, one nothing."""
    allowed = np.random.default_rng(3).random((B, T, S)) < 0.6
    allowed[0, 0], allowed[1, 2], allowed[0, 1] = True, False, [False, False, True, False, False]
    return allowed


def probs_by_hand(scores, allowed):
    out = np.zeros(scores.shape)
    for b, n, t in np.ndindex(B, N, T):
        seen = np.flatnonzero(allowed[b, t])
        if len(seen):
            top = max(float(s) for s in scores[b, n, t, seen])
            weights = [math.exp(float(s) - top) for s in scores[b, n, t, seen]]
            out[b, n, t, seen] = [w / math.fsum(weights) for w in weights]
    return out


def probs_bound(scores, want, numerics):
    # A score minus the highest, d, is rounded once: |d| units relative on its exp, itself good to 2.5 ulps or 5 units.
    # The sum is at least 1: in it these weigh at most d exp(-d) < .37 each, and 5, and S for its additions. Then a
    # quotient.
    distance = (scores.max(axis=-1, keepdims=True) - scores).astype(np.float64)
    relative = (distance + 5) + (0.37 * S + 5 + S) + 1
    return relative * units(numerics) * want + np.finfo(numerics.dtype).tiny  # below that, numbers have fewer digits


@BOTH
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["gentle", "peaked"])
def test_probs_are_within_their_rounding_bound(numerics, size):
    scores = (np.random.default_rng(4).normal(size=(B, N, T, S)) * size + 1000).astype(numerics.dtype)
    allowed, before = allowed_example(), scores.copy()
    got, want = attention_probs(scores, allowed, numerics=numerics), probs_by_hand(scores, allowed)
    bound = probs_bound(scores, want, numerics)
    assert got.dtype == numerics.dtype
    assert np.all(np.abs(got - want) <= bound)
    assert np.array_equal(scores, before)
    everything = probs_by_hand(scores, np.ones_like(allowed))
    masked_late = np.where(allowed[:, None], everything, 0)  # zeroed after the softmax: rows no longer sum to one
    for mistaken in (everything, masked_late):
        assert np.any(np.abs(got - mistaken) > bound)


@BOTH
def test_a_query_without_keys_mixes_nothing(numerics):
    """E7: neither NaN, as with -inf throughout, nor a uniform row, as with a large negative number."""
    scores = np.random.default_rng(5).normal(size=(B, N, T, S)).astype(numerics.dtype)
    allowed = allowed_example()
    got = attention_probs(scores, allowed, numerics=numerics)
    assert np.array_equal(got[1, :, 2], np.zeros((N, S)))
    assert np.all(got[np.broadcast_to(~allowed[:, None], got.shape)] == 0)
    sums = got.sum(axis=-1, dtype=np.float64)
    some = np.broadcast_to(allowed.any(axis=-1)[:, None], sums.shape)
    assert np.all(np.abs(sums[some] - 1) <= (S + 1) * units(numerics))  # each quotient once, the sum of weights S times
    assert np.array_equal(got[0, :, 1], np.tile([0, 0, 1, 0, 0], (N, 1)))  # one key takes all


@BOTH
def test_scores_of_any_size_do_not_overflow(numerics):
    scores = np.zeros((B, N, T, S), numerics.dtype)
    scores[..., 1], scores[..., 2] = 1e30, -1e30
    got = attention_probs(scores, np.ones((B, T, S), bool), numerics=numerics)
    assert np.array_equal(got[0, 0, 0], [0, 1, 0, 0, 0])


# ---- mix


@BOTH
def test_mix_is_within_its_rounding_bound(numerics):
    _, _, v = example(numerics)
    probs = np.random.default_rng(6).random((B, N, T, S)).astype(numerics.dtype)
    got = attention_mix(probs, v, numerics=numerics)
    assert got.dtype == numerics.dtype
    assert got.shape == (B, T, N, H)

    def by_hand(kv_head, signs):
        out = np.empty((B, T, N, H))
        for b, t, n, h in np.ndindex(B, T, N, H):
            terms = (float(p) * float(x) for p, x in zip(probs[b, n, t], v[b, kv_head(n), :, h], strict=True))
            out[b, t, n, h] = math.fsum(map(signs, terms))
        return out

    want, size = by_hand(lambda n: n // G, float), by_hand(lambda n: n // G, abs)
    bound = (S + 1) * units(numerics) * size  # S products, S - 1 additions; one to second order
    assert np.all(np.abs(got - want) <= bound)
    assert np.any(np.abs(got - by_hand(lambda n: n % K, float)) > bound)  # E6


# ---- rounding points


@pytest.mark.parametrize("point", ["attn.scores", "attn.probs", "attn.mix"])
def test_results_are_rounded_where_the_profile_says(point):
    q, k, v = example(FLOAT32)
    allowed = allowed_example()
    rounded = Numerics("test", np.dtype(np.float32), {point: "bfloat16"})
    plain, narrow = (
        {
            "attn.scores": attention_scores(q, k, scale=SCALE, numerics=numerics),
            "attn.probs": attention_probs(attention_scores(q, k, scale=SCALE), allowed, numerics=numerics),
            "attn.mix": attention_mix(
                attention_probs(attention_scores(q, k, scale=SCALE), allowed), v, numerics=numerics
            ),
        }[point]
        for numerics in (FLOAT32, rounded)
    )
    assert np.array_equal(narrow, from_bfloat16(to_bfloat16(plain)))
    assert not np.array_equal(narrow, plain)


def test_the_query_is_rounded_after_its_scale():
    q, k, _ = example(FLOAT32)
    rounded = Numerics("test", np.dtype(np.float32), {"attn.query": "bfloat16"})
    got = attention_scores(q, k, scale=SCALE, numerics=rounded)
    by_hand = attention_scores(from_bfloat16(to_bfloat16(q * np.float32(SCALE))), k, scale=1.0)
    assert np.array_equal(got, by_hand)
    assert not np.array_equal(got, attention_scores(from_bfloat16(to_bfloat16(q)), k, scale=SCALE))
