"""The draw: which token a uniform number picks, how often each comes, and what the uniform numbers depend on."""

import math
from fractions import Fraction

import numpy as np
import pytest

from refgemma.sampling import SamplingParams, decide, uniform

PLAIN = SamplingParams(temperature=1.0)


def logits_of(*probs):
    """Logits of these probabilities."""
    with np.errstate(divide="ignore"):
        return np.log(np.array(probs, dtype=np.float64))


def drawn_slowly(probs, u):
    """Smallest id whose cumulative probability exceeds u times the total, in exact arithmetic."""
    total = sum(map(Fraction, probs))
    mass = Fraction(0)
    for i, p in enumerate(probs):
        mass += Fraction(p)
        if mass > Fraction(u) * total:
            return i
    raise AssertionError("u is not below 1")


LAST_U = float(np.nextafter(1.0, 0.0))


@pytest.mark.parametrize(
    "probs", [(0.25, 0.25, 0.5), (0.5, 0.25, 0.25), (0, 0.5, 0, 0.25, 0.25, 0), (1.0,), (0, 1.0), (0.125,) * 8]
)
def test_the_draw_is_the_first_cumulative_probability_above_u(probs):
    logits = logits_of(*probs)
    assert decide(logits, PLAIN).probs.tolist() == list(probs)  # powers of two: exact, so equality is equality
    borders = [k / 8 for k in range(8)]
    for u in {
        *borders,
        *(float(np.nextafter(b, 1)) for b in borders),
        *(float(np.nextafter(b, 0)) for b in borders[1:]),
        LAST_U,
    }:
        decision = decide(logits, PLAIN, u=u)
        assert decision.token == drawn_slowly(probs, u)
        assert decision.u == u


def test_the_draw_rejects_other_rules():
    probs = (0.25, 0.25, 0.5)
    logits = logits_of(*probs)
    assert decide(logits, PLAIN, u=0.25).token == 1  # not 0, as where the mass need only reach u
    assert decide(logits, PLAIN, u=0.3).token == 1  # not 2, as where the most likely token comes first
    assert decide(logits, PLAIN, u=0.0).token == 0


def test_the_draw_never_takes_what_has_no_probability():
    """Neither a removed token nor one whose probability is too small for a float64."""
    for logits in (np.array([-np.inf, 0.0, -np.inf]), np.array([-900.0, 0.0, -900.0])):
        for u in (0.0, 0.5, LAST_U):
            assert decide(logits, PLAIN, u=u).token == 1


def test_the_draw_agrees_with_exact_arithmetic_on_random_logits():
    rng = np.random.default_rng(11)
    agreed = 0
    for _ in range(300):
        logits = rng.normal(size=rng.integers(1, 40)) * 4
        u = float(rng.random())
        decision = decide(logits, SamplingParams(temperature=0.8, top_p=0.95), u=u)
        # Running sums of 40 numbers are good to 40 roundings: where u is that near to a border, either side is right.
        near = {
            drawn_slowly(decision.probs.tolist(), min(max(u + sign * 40 * 2**-53, 0), LAST_U)) for sign in (-1, 0, 1)
        }
        assert decision.token in near
        assert decision.token in decision.kept
        agreed += near == {decision.token}
    assert agreed >= 299


CHI_SQUARE_SLACK = 5.0


def chi_square_is_plausible(counts, expected):
    """Pearson's statistic lies within five standard deviations, sqrt(2 (n - 1)), above its mean n - 1."""
    counts, expected = np.ravel(counts), np.ravel(expected)
    assert expected.min() >= 5  # the usual condition for the statistic to be distributed as said
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return statistic <= freedom + CHI_SQUARE_SLACK * math.sqrt(2 * freedom)


PROBS = np.array([0.3, 0.05, 0.25, 0.1, 0.02, 0.28])


@pytest.mark.parametrize("varied", ["token of one sequence", "sequence of one token", "both"])
def test_draws_are_distributed_as_their_probabilities(varied):
    draws = 6000
    pairs = {
        "token of one sequence": [(7, t) for t in range(draws)],
        "sequence of one token": [(s, 3) for s in range(draws)],
        "both": [(s, t) for s in range(60) for t in range(100)],
    }[varied]
    logits = logits_of(*PROBS)
    tokens = [decide(logits, PLAIN, u=uniform(s, t)).token for s, t in pairs]
    counts = np.bincount(tokens, minlength=len(PROBS))
    assert chi_square_is_plausible(counts, PROBS * draws)
    warmer = PROBS ** (1 / 1.2) / (PROBS ** (1 / 1.2)).sum()
    assert not chi_square_is_plausible(counts, warmer * draws)  # it can fail: T = 1.2 is seen


def test_neighbouring_uniform_numbers_are_independent():
    """Of one token and the next, and of one seed and the next: all pairs of tenths are equally frequent."""
    u = np.array([[uniform(s, t) for t in range(101)] for s in range(101)])
    assert u.min() >= 0
    assert u.max() < 1
    tenth = (u * 10).astype(int)
    for first, second in ((tenth[:, :-1], tenth[:, 1:]), (tenth[:-1], tenth[1:]), (tenth, tenth.T)):
        off_diagonal = first is not tenth or ~np.eye(len(tenth), dtype=bool)
        pairs = (first * 10 + second)[off_diagonal].ravel()
        counts = np.bincount(pairs, minlength=100)
        assert chi_square_is_plausible(counts, np.full(100, len(pairs) / 100))
    same = np.bincount((tenth * 11).ravel(), minlength=100)  # it can fail: a number next to itself is seen
    assert not chi_square_is_plausible(same, np.full(100, tenth.size / 100))


def test_uniform_numbers_of_seed_7():
    assert [round(uniform(7, t), 8) for t in range(3)] == [0.87207345, 0.08284269, 0.01410770]


def test_uniform_numbers_depend_on_seed_and_index_alone():
    forwards = [uniform(7, t) for t in range(5)]
    other = [uniform(s, t) for t in range(5) for s in (0, 8, 2**64 - 1)]
    assert [uniform(7, t) for t in reversed(range(5))] == forwards[::-1]
    assert len({*forwards, *other}) == 20
    np.random.default_rng(7).random()
    assert uniform(7, 0) == forwards[0]
