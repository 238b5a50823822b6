"""A million draws: that tokens come as often as they should, and that the streams of (seed, t) are independent.

A million calls of `uniform` and `decide` would take half a minute. Instead the million numbers of a stream are taken in
one go, and `decide` is called where its choice changes: for one distribution the token is a step function of u, and its
steps are found by bisection, to the last bit. Both shortcuts are held against the functions themselves.
"""

import math

import numpy as np
import pytest

from refgemma.sampling import SamplingParams, decide, uniform

DRAWS = 1_000_000
GRID = 2**53  # u is a multiple of 1 / GRID


def stream(seed, count):
    """``uniform(seed, t)`` for t below count: a counter is a block of four numbers, of which the first is taken."""
    return np.random.Generator(np.random.Philox(key=seed, counter=0)).random(4 * count)[::4]


SEEDS = [0, 7, 2**64 - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stream_in_one_go_is_the_function(seed):
    numbers = stream(seed, DRAWS)
    for t in [0, 1, 2, 3, 4, DRAWS - 1, *np.random.default_rng(seed).integers(DRAWS, size=300).tolist()]:
        assert numbers[t] == uniform(seed, t)
    assert np.array_equal(np.floor(numbers * GRID), numbers * GRID)


class Drawer:
    """The token that `decide` picks, as a step function of u."""

    def __init__(self, logits, params):
        self.logits, self.params = logits, params
        self.probs = decide(logits, params).probs
        self.tokens, self.starts = [self.pick(0)], [0]
        while self.tokens[-1] != self.pick(GRID - 1):
            low, high = self.starts[-1], GRID - 1  # at low it is the last token, at high a later one
            while high - low > 1:
                middle = (low + high) // 2
                if self.pick(middle) == self.tokens[-1]:
                    low = middle
                else:
                    high = middle
            self.starts.append(high)
            self.tokens.append(self.pick(high))

    def pick(self, k):
        return decide(self.logits, self.params, u=k / GRID).token

    def __call__(self, u):
        places = np.searchsorted(np.array(self.starts), (u * GRID).astype(np.int64), side="right") - 1
        return np.array(self.tokens)[places]


def chi_square(counts, expected):
    """Pearson's statistic, as a number of standard deviations.

    The cube root of a chi-square over its degrees of freedom is nearly normal (Wilson and Hilferty, "The Distribution
    of Chi-Square", 1931). A right draw exceeds five of them one time in two million.
    """
    counts, expected = np.ravel(counts), np.ravel(expected)
    assert expected.min() >= 5  # the usual condition
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


BAR = 5.0

LOGITS = np.random.default_rng(1).normal(size=120) * 2
SETTINGS = {
    "all tokens": {"temperature": 1.0},
    "cut": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "warm": {"temperature": 3.0, "top_p": 0.95},
}


def by_hand(logits, temperature, top_k=None, top_p=1.0):
    """Probabilities in Python floats with exact sums."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in order}
    total, mass, stay = math.fsum(weights.values()), 0.0, []
    for i in order:
        if stay and mass >= top_p * total:
            break
        stay.append(i)
        mass = math.fsum(weights[j] for j in stay)
    return np.array([weights[i] / mass if i in stay else 0.0 for i in range(len(logits))])


@pytest.fixture(scope="module")
def drawers():
    return {name: Drawer(LOGITS, SamplingParams(**settings)) for name, settings in SETTINGS.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_step_function_is_decide(drawers, name):
    drawer = drawers[name]
    assert drawer.tokens == np.flatnonzero(drawer.probs).tolist()
    u = stream(99, 3000)
    assert drawer(u).tolist() == [decide(LOGITS, drawer.params, u=x).token for x in u.tolist()]
    for start in drawer.starts[1:20]:
        assert drawer.pick(start) != drawer.pick(start - 1)


def pooled(counts, expected):
    """Tokens that are expected less than ten times, together."""
    rare = expected < 10
    if not rare.any():
        return counts, expected
    return np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_million_draws_are_distributed_as_their_probabilities(drawers, name, seed):
    want = by_hand(LOGITS.tolist(), **SETTINGS[name])
    tokens = drawers[name](stream(seed, DRAWS))
    counts = np.bincount(tokens, minlength=len(LOGITS))
    assert counts[want == 0].sum() == 0
    present = want > 0
    assert abs(chi_square(*pooled(counts[present], want[present] * DRAWS))) < BAR
    # It can fail: a temperature wrong by 5 %, numbers that lack the lowest 1/500, numbers that are not quite uniform.
    warmer = by_hand(LOGITS.tolist(), **SETTINGS[name] | {"temperature": SETTINGS[name]["temperature"] * 1.05})
    if np.array_equal(warmer > 0, present):
        assert chi_square(*pooled(counts[present], warmer[present] * DRAWS)) > BAR
    for wrong in (0.002 + 0.998 * stream(seed, DRAWS), stream(seed, DRAWS) ** 1.03):
        missed = np.bincount(drawers[name](wrong), minlength=len(LOGITS))
        assert chi_square(*pooled(missed[present], want[present] * DRAWS)) > BAR


# ---- streams

SIDE = 1000
PARTNERS = {  # of number (s, t) on a square of seeds and tokens
    "the next token": lambda u: (u[:, :-1], u[:, 1:]),
    "the token after that": lambda u: (u[:, :-2], u[:, 2:]),
    "four tokens on": lambda u: (u[:, :-4], u[:, 4:]),
    "the next seed": lambda u: (u[:-1], u[1:]),
    "two seeds on": lambda u: (u[:-2], u[2:]),
    "the seed with another lowest bit": lambda u: (u[0::2], u[1::2]),
    "the seed with another high bit": lambda u: (u[:488], u[512:]),
    "seed and token exchanged": lambda u: (u[np.triu_indices(SIDE, 1)], u.T[np.triu_indices(SIDE, 1)]),
    "the next seed, the token before": lambda u: (u[:-1, 1:], u[1:, :-1]),
    "the next seed, the next token": lambda u: (u[:-1, :-1], u[1:, 1:]),
}


def worst_pair(u, cells=20):
    """The pairs that are least evenly spread over a square of cells, in standard deviations, and how they pair."""
    cell = (u * cells).astype(int)
    found = {}
    for name, partners in PARTNERS.items():
        first, second = partners(cell)
        counts = np.bincount((first * cells + second).ravel(), minlength=cells**2)
        found[name] = abs(chi_square(counts, np.full(cells**2, first.size / cells**2)))
    return max(found.items(), key=lambda item: item[1])


SQUARES = {"small seeds": 0, "large seeds": 2**64 - SIDE}


@pytest.mark.parametrize("first", SQUARES.values(), ids=SQUARES.keys())
def test_streams_of_seed_and_token_are_independent(first):
    u = np.array([stream(first + s, SIDE) for s in range(SIDE)])
    assert len(np.unique(u)) == u.size  # of 2**53 numbers a million are all different, but once in 18,000 times
    assert worst_pair(u)[1] < BAR
    # Sums over seeds and over tokens: 1000 numbers each of mean 1/2 and variance 1/12, their own chi-squares.
    for means in (u.mean(axis=0), u.mean(axis=1)):
        statistic = (((means - 0.5) ** 2) * 12 * SIDE).sum()
        z = ((statistic / SIDE) ** (1 / 3) - (1 - 2 / (9 * SIDE))) / math.sqrt(2 / (9 * SIDE))
        assert abs(z) < BAR


def test_tokens_of_neighbouring_streams_are_independent(drawers):
    """Tokens, not numbers: pairs of one sequence and the next are as frequent as the product of their probabilities."""
    drawer = drawers["cut"]
    tokens = np.searchsorted(drawer.tokens, drawer(np.array([stream(s, SIDE) for s in range(SIDE)])))
    probs = drawer.probs[drawer.tokens]
    for first, second in ((tokens[:-1], tokens[1:]), (tokens[:, :-1], tokens[:, 1:])):
        counts = np.bincount((first * len(probs) + second).ravel(), minlength=len(probs) ** 2)
        assert abs(chi_square(*pooled(counts, np.outer(probs, probs).ravel() * first.size))) < BAR


WRONG_STREAMS = {
    "seed plus token": lambda: np.array([stream(0, 2 * SIDE)[s : s + SIDE] for s in range(SIDE)]),
    "the seed has no say": lambda: np.tile(stream(0, SIDE), (SIDE, 1)),
    "the token has no say": lambda: np.tile(stream(0, SIDE)[:, None], (1, SIDE)),
    "a generator that is linear in its seed": lambda: (
        (np.arange(SIDE)[:, None] * 1103515245 + np.arange(SIDE) * 12345) % 2**31 / 2**31
    ),
}


@pytest.mark.parametrize("name", WRONG_STREAMS)
def test_dependent_streams_are_seen(name):
    assert worst_pair(WRONG_STREAMS[name]())[1] > 10 * BAR
