"""Each step against worked examples, and against a slow and obvious version of itself in exact arithmetic."""

import bisect
import math
from fractions import Fraction

import numpy as np
import pytest

from refgemma.sampling import steps

UNIT = 2.0**-53  # what one rounding in float64 does, relatively


def kept(logits):
    """Ids that were not removed."""
    return np.flatnonzero(logits > -np.inf).tolist()


def logits_of(*probs):
    """Logits of these probabilities."""
    return np.log(np.array(probs, dtype=np.float64))


def descending(logits):
    """All ids, the most likely first, lower ids first on ties."""
    logits = logits.tolist()
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


# ---- penalties


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once():
    logits = np.array([3.0, -3.0, 0.0, 3.0, -3.0, 3.0])
    out = steps.repetition_penalty(logits, [0, 1, 2, 0, 0, 1, 5], 1.5)
    assert out.tolist() == [2.0, -4.5, 0.0, 3.0, -3.0, 2.0]
    assert out.tolist() != (logits / np.array([1.5, 1.5, 1.5, 1, 1, 1.5])).tolist()  # division of all rewards token 1
    assert out[0] != 3.0 / 1.5**3  # once, though token 0 has occurred three times


def test_repetition_penalty_below_one_rewards():
    assert steps.repetition_penalty(np.array([2.0, -2.0]), [0, 1], 0.5).tolist() == [4.0, -1.0]


def test_frequency_penalty_counts_every_occurrence():
    out = steps.frequency_penalty(np.array([3.0, -3.0, 0.0, 1.0]), [0, 1, 0, 0, 2], 0.5)
    assert out.tolist() == [1.5, -3.5, -0.5, 1.0]


def test_presence_penalty_counts_once():
    out = steps.presence_penalty(np.array([3.0, -3.0, 0.0, 1.0]), [0, 1, 0, 0, 2], 0.5)
    assert out.tolist() == [2.5, -3.5, -0.5, 1.0]


@pytest.mark.parametrize("step", [steps.repetition_penalty, steps.frequency_penalty, steps.presence_penalty])
def test_penalties_leave_alone_what_has_not_occurred_what_is_removed_and_their_input(step):
    logits = np.array([1.0, -np.inf, 2.0])
    before = logits.copy()
    assert step(logits, [], 1.5).tolist() == logits.tolist()
    assert step(logits, [1, 1], 1.5).tolist() == logits.tolist()
    assert step(logits, [2], 1.5)[2] != 2.0
    assert np.array_equal(logits, before)


# ---- temperature


def test_temperature_divides():
    logits = np.array([1.0, -2.0, -np.inf])
    assert steps.temperature(logits, 0.5).tolist() == [2.0, -4.0, -np.inf]
    assert logits.tolist() == [1.0, -2.0, -np.inf]


# ---- top-k


@pytest.mark.parametrize("k", range(1, 9))
def test_top_k_keeps_exactly_k_lower_ids_first(k):
    logits = np.array([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, -np.inf])
    out = steps.top_k(logits, k)
    assert kept(out) == ([1], [1, 3], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5], *[[0, 1, 2, 3, 4, 5]] * 3)[k - 1]
    assert np.array_equal(out[kept(out)], logits[kept(out)])
    assert logits.tolist() == [1.0, 3.0, 2.0, 3.0, 2.0, 2.0, -np.inf]
    ties_kept = np.flatnonzero(logits >= np.sort(logits)[::-1][k - 1 : k].max(initial=-np.inf)).tolist()
    if k in (1, 3, 4):  # the rule of transformers is another one where the border is tied
        assert ties_kept != kept(out)


@pytest.mark.parametrize("V", [1, 2, 7, 1000, 300_000])
@pytest.mark.parametrize("levels", [1, 3, 10**9])  # all tied, many tied, few tied
def test_top_k_is_the_head_of_a_sorted_list(V, levels):
    logits = np.random.default_rng([V, levels]).integers(levels, size=V) / 8.0
    order = descending(logits)
    for k in {1, 2, min(V, 50), max(1, V // 2), V, V + 1}:
        assert kept(steps.top_k(logits, k)) == sorted(order[:k])


# ---- top-p

WORKED = {  # p = .5 .25 .125 .125; of the tied pair the lower id stays
    0.0: [0],
    1e-300: [0],
    0.3: [0],
    0.5: [0],
    0.75: [0, 1],
    0.8: [0, 1, 2],
    0.875: [0, 1, 2],
    0.9: [0, 1, 2, 3],
    1.0: [0, 1, 2, 3],
}


@pytest.mark.parametrize("p", WORKED)
def test_top_p_worked_example(p):
    assert kept(steps.top_p(logits_of(0.5, 0.25, 0.125, 0.125), p)) == WORKED[p]


WRONG_TOP_P = {  # probabilities and p in, ids out; each is what some engine does or did
    "one more at equality (gemma_pytorch, keras-hub)": lambda probs, p: walk(probs, lambda before, own: before <= p),
    "the token that crosses is dropped": lambda probs, p: walk(probs, lambda before, own: before + own <= p) or [0],
    "all ties at the border stay (DeepMind)": lambda probs, p: [
        i
        for i, own in enumerate(probs)
        if own >= min(probs[j] for j in walk(probs, lambda before, _: before < p) or [0])
    ],
    "ascending, the last of a tie survives (vLLM)": lambda probs, p: sorted(
        3 - i for i in walk(probs[::-1], lambda before, own: before < p) or [3]
    ),
    "least likely first": lambda probs, p: walk(probs, lambda before, own: before < p, descending=False) or [3],
    "no token forced (p = 0 keeps none)": lambda probs, p: walk(probs, lambda before, own: before < p),
}


def walk(probs, keep, descending=True):
    """Ids in order of probability for as long as ``keep(mass before, own mass)``."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i] if descending else probs[i])
    before, ids = 0.0, []
    for i in order:
        if not keep(before, probs[i]):
            break
        ids.append(i)
        before += probs[i]
    return sorted(ids)


@pytest.mark.parametrize("variant", WRONG_TOP_P)
def test_the_worked_example_rejects_other_rules(variant):
    answers = {p: WRONG_TOP_P[variant]([0.5, 0.25, 0.125, 0.125], p) for p in WORKED if p < 1}
    assert any(answers[p] != WORKED[p] for p in answers)


def masses(logits):
    """Exact mass before each token of the descending list, and of all, in units of 2**-1074."""
    sums = [0]
    for weight in (math.exp(logit - logits[0]) for logit in logits):
        numerator, denominator = weight.as_integer_ratio()
        sums.append(sums[-1] + numerator * (2**1074 // denominator))
    return sums


def fewest_and_most(sums, p):
    """How many tokens p keeps at least and at most, where masses may be off by as much as rounding explains."""
    # exp is good to a unit or two, a running sum of V numbers to V units of the total; p times it is one rounding more.
    slack = (len(sums) + 4) * Fraction(UNIT)
    wanted = [(Fraction(p) + sign * slack) * sums[-1] for sign in (-1, 1)]
    return [max(1, bisect.bisect_left(sums, border, hi=len(sums) - 1)) for border in wanted]


def logits_named(kind, V):
    rng = np.random.default_rng(V)
    return {
        "flat": np.zeros(V),
        "nearly flat": rng.normal(size=V) * 1e-3,
        "normal": rng.normal(size=V) * 3.0,
        "peaked": rng.normal(size=V) * 3.0 + 40.0 * (np.arange(V) == V // 2),
        "in steps": rng.integers(20, size=V) / 4.0,
        "mostly removed": np.where(rng.random(V) < 0.99, -np.inf, rng.normal(size=V)),
    }[kind]


@pytest.mark.parametrize("V", [2, 63, 64, 65, 600, 5000])
@pytest.mark.parametrize("kind", ["flat", "nearly flat", "normal", "peaked", "in steps", "mostly removed"])
def test_top_p_is_a_walk_down_the_sorted_list(kind, V):
    logits = logits_named(kind, V)
    logits[V - 1] = max(logits[V - 1], 0.0)  # something is left
    order = descending(logits)
    sums = masses(logits[order].tolist())
    sharp = 0
    for p in (0.0, 1e-12, 0.12345, 0.54321, 0.9, 0.999, 1 - 1e-12):
        out = steps.top_p(logits, p)
        fewest, most = fewest_and_most(sums, p)
        got = np.count_nonzero(out > -np.inf)
        assert fewest <= got <= most
        assert kept(out) == sorted(order[:got])
        assert np.array_equal(out[kept(out)], logits[kept(out)])
        sharp += fewest == most
    assert sharp >= 4  # mostly, in spite of the bound, there is one right answer


def test_top_p_of_a_large_vocabulary():
    V = 300_000
    for kind in ("flat", "normal"):
        logits = logits_named(kind, V)
        order = descending(logits)
        fewest, most = fewest_and_most(masses(logits[order].tolist()), 0.9)
        out = steps.top_p(logits, 0.9)
        got = np.count_nonzero(out > -np.inf)
        assert fewest <= got <= most
        assert most - fewest <= 2
        assert kept(out) == sorted(order[:got])


@pytest.mark.parametrize("V", [4, 64, 512, 4096, 2**18])
def test_top_p_stops_where_the_mass_is_exactly_p(V):
    """V equal tokens, V a power of two: every mass and every j / V is a float64 number, equal and not only near."""
    logits = np.full(V, -7.25)
    for j in {1, 2, 3, V // 2 + 1, V - 1}:
        assert kept(steps.top_p(logits, j / V)) == list(range(j))
        above = float(np.nextafter(j / V, 1))
        assert kept(steps.top_p(logits, above)) == list(range(j + 1))
        below = float(np.nextafter(j / V, 0))
        assert kept(steps.top_p(logits, below)) == list(range(j))


@pytest.mark.parametrize("p", [0.0, 5e-324, 1e-12, 1e-7])
def test_tiny_p_keeps_the_most_likely_token(p):
    """1 - p may round to 1, and p times the total to 0: https://github.com/ml-explore/mlx-lm/pull/1912."""
    logits = np.random.default_rng(3).normal(size=1000)
    assert kept(steps.top_p(logits, p)) == [logits.argmax()]
    assert kept(steps.top_p(np.zeros(1000), p)) == [0]


def test_top_p_orders_by_logit_where_probabilities_vanish_or_coincide():
    """exp(-800) is 0 in float64, as is exp(-900); and exp cannot tell 1 - 10 from the next number - 10."""
    assert kept(steps.top_p(np.array([-900.0, 0.0, -800.0, -1.0]), 0.99)) == [1, 3]
    after_one = float(np.nextafter(1.0, 2.0))
    assert after_one - 10 == 1.0 - 10
    assert kept(steps.top_p(np.array([1.0, after_one, 10.0]), 0.9998)) == [1, 2]


def test_top_p_of_what_top_k_left_is_renormalised():
    """p = .1 .2 .3 .4, k = 2, p = .5: .4 is .571 of the rest; before top-k it would take .3 as well."""
    logits = logits_of(0.1, 0.2, 0.3, 0.4)
    assert kept(steps.top_p(steps.top_k(logits, 2), 0.5)) == [3]
    assert kept(steps.top_k(steps.top_p(logits, 0.5), 2)) == [2, 3]


def test_top_p_leaves_its_input_alone():
    logits = np.random.default_rng(5).normal(size=100)
    before = logits.copy()
    steps.top_p(logits, 0.5)
    assert np.array_equal(logits, before)


# ---- bias and bans


def test_logit_bias_adds():
    logits = np.array([1.0, -2.0, -np.inf, 4.0])
    for biases in ({0: 0.5, 1: -1.5, 2: 100.0}, ((0, 0.5), (1, -1.5), (2, 100.0))):
        assert steps.logit_bias(logits, biases).tolist() == [1.5, -3.5, -np.inf, 4.0]  # removed tokens stay removed
    assert logits.tolist() == [1.0, -2.0, -np.inf, 4.0]


def test_banned_removes():
    logits = np.array([1.0, -2.0, 3.0])
    assert steps.banned(logits, (0, 2)).tolist() == [-np.inf, -2.0, -np.inf]
    assert logits.tolist() == [1.0, -2.0, 3.0]
    for nothing_left in ((0, 1, 2), [2, 0, 1, 1]):
        with pytest.raises(ValueError, match=r"^banned holds every token that could be chosen: "):
            steps.banned(logits, nothing_left)
    with pytest.raises(ValueError, match=r"^banned holds every token that could be chosen: "):
        steps.banned(np.array([-np.inf, 0.0]), (1,))


# ---- min-p


@pytest.mark.parametrize(
    ("p", "want"),
    [(0.0, [0, 1, 2, 3]), (0.2, [0, 1, 2, 3]), (0.25, [0, 1, 2, 3]), (0.26, [0, 1]), (0.5, [0, 1]), (1, [0])],
)
def test_min_p_worked_example(p, want):
    """p = .5 .25 .125 .125; at equality, as at .5 and .25, a token stays, as in vLLM and transformers."""
    logits = logits_of(0.5, 0.25, 0.125, 0.125)
    assert kept(steps.min_p(logits, p)) == want
    assert kept(steps.min_p(logits + 3.0, p)) == want  # three digits of exp are gone, but differences are exact enough
    of_the_total = [i for i, own in enumerate((0.5, 0.25, 0.125, 0.125)) if own >= p]
    if p in (0.2, 0.5, 1):
        assert of_the_total != want  # the wrong variant: p of 1, and not of the highest probability


def test_min_p_keeps_all_that_tie_and_leaves_its_input_alone():
    logits = np.array([2.0, 3.0, -np.inf, 3.0])
    assert kept(steps.min_p(logits, 1.0)) == [1, 3]
    assert kept(steps.min_p(logits, 1e-300)) == [0, 1, 3]
    assert logits.tolist() == [2.0, 3.0, -np.inf, 3.0]


# ---- typical


def test_typical_worked_example():
    """p = .4 .3 .2 .1: entropy 1.280, surprises .916 1.204 1.609 2.303, distances .364 .076 .330 1.023."""
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    wants = {0.0: [1], 0.3: [1], 0.31: [1, 2], 0.49: [1, 2], 0.51: [0, 1, 2], 0.89: [0, 1, 2], 0.91: [0, 1, 2, 3]}
    for p, want in wants.items():
        assert kept(steps.typical(logits, p)) == want
    assert kept(steps.top_p(logits, 0.49)) == [0, 1]  # the most likely are others
    assert kept(steps.typical(logits, 1.0)) == [0, 1, 2, 3]


def typical_by_hand(logits, p):
    """Fewest and most tokens that p may keep, and all in order, from exact sums."""
    left = [i for i in range(len(logits)) if logits[i] > -math.inf]
    weights = {i: math.exp(logits[i] - max(logits)) for i in left}
    total = math.fsum(weights.values())
    entropy = -math.fsum(w / total * math.log(w / total) for w in weights.values())
    order = sorted(left, key=lambda i: (abs(-math.log(weights[i] / total) - entropy), i))
    before = [math.fsum(weights[i] for i in order[:n]) / total for n in range(len(order))]
    # Up to 40 terms a sum, each good to some units: 1e-13 is more than they can be off by together.
    return [max(1, sum(mass < p + slack for mass in before)) for slack in (-1e-13, 1e-13)], order


def test_typical_is_a_walk_from_the_entropy_outwards():
    rng = np.random.default_rng(17)
    sharp = not_the_likeliest = 0
    for _ in range(300):
        logits = rng.normal(size=rng.integers(1, 40)) * rng.uniform(0.1, 4)
        logits[1:][rng.random(len(logits) - 1) < 0.2] = -np.inf
        p = float(rng.uniform(0, 1))
        (fewest, most), order = typical_by_hand(logits.tolist(), p)
        out = steps.typical(logits, p)
        got = len(kept(out))
        assert fewest <= got <= most
        assert kept(out) == sorted(order[:got])
        assert np.array_equal(out[kept(out)], logits[kept(out)])
        sharp += fewest == most
        not_the_likeliest += kept(out) != kept(steps.top_p(logits, p))
    assert sharp == 300
    assert not_the_likeliest > 100


def test_typical_of_a_flat_distribution_takes_lower_ids_and_of_a_large_one_grows():
    assert kept(steps.typical(np.zeros(8), 0.5)) == [0, 1, 2, 3]
    logits = logits_named("normal", 50_000)
    out = steps.typical(logits, 0.9)
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    distance = np.abs(-np.log(probs) + (probs * np.log(probs)).sum())
    stays = out > -np.inf
    assert distance[stays].max() <= distance[~stays].min() + 1e-12
    assert 0.9 <= probs[stays].sum() < 0.9 + 2 * probs.max()
    assert stays.sum() > 1024  # more than the head that is looked at first
