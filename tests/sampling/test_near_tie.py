"""The nearest other outcome, against brute force: every logit of a small vocabulary moved up or down, in all ways."""

import itertools
import math

import numpy as np
import pytest

from refgemma.sampling import SamplingParams, decide, record_logits
from refgemma.sampling.near_tie import nearest_flip

V = 5
SIGNS = np.array(list(itertools.product((-1.0, 1.0), repeat=V)))
PROMPT, OUTPUT = [0, 1], [1, 2]


def flips(logits, params, u, size):
    """Whether some move of every logit by this size gives another token."""
    token = decide(logits, params, PROMPT, OUTPUT, u).token
    return any(decide(logits + size * signs, params, PROMPT, OUTPUT, u).token != token for signs in SIGNS)


def nearest(logits, params, u):
    return nearest_flip(logits, params, decide(logits, params, PROMPT, OUTPUT, u, record=True))


def random_settings(rng, cuts):
    settings = {"temperature": float(rng.choice([0.7, 1.0, 1.6]))}
    if "top_k" in cuts:
        settings["top_k"] = int(rng.integers(1, V))
    if "top_p" in cuts:
        settings["top_p"] = float(rng.uniform(0.2, 0.99))
    if "min_p" in cuts:
        settings["min_p"] = float(rng.uniform(0.01, 0.6))
    if "typical_p" in cuts:
        settings["typical_p"] = float(rng.uniform(0.2, 0.99))
    if rng.random() < 0.5:
        settings |= {"repetition_penalty": float(rng.uniform(0.7, 1.5)), "frequency_penalty": 0.3}
    return SamplingParams(**settings)


# To first order: of changes up to 1e-2 the error is a percent or two of them.
NEAR, MARGIN = 1e-2, 0.03


@pytest.mark.parametrize("cuts", [(), ("top_k",), ("top_p",), ("min_p",), ("typical_p",), ("top_k", "top_p", "min_p")])
def test_nothing_smaller_flips_and_this_does(cuts):
    rng = np.random.default_rng([len(cuts), *map(ord, "".join(cuts))])
    count = reached = 0
    steps = set()
    while count < 40:
        logits, params, u = rng.normal(size=V) * 1.5, random_settings(rng, cuts), float(rng.random())
        flip = nearest(logits, params, u)
        if not flip.size < NEAR:
            continue
        count += 1
        steps.add(flip.step)
        assert not flips(logits, params, u, (1 - MARGIN) * flip.size)
        reached += flips(logits, params, u, (1 + MARGIN) * flip.size)
    # Where two borders must be crossed at once, or two tokens stand on either side of the entropy at one distance,
    # first order promises no more than that nothing smaller will do.
    assert reached >= (20 if "typical_p" in cuts else 38)
    assert steps >= {"draw", *(cut.removesuffix("_p") if cut == "typical_p" else cut for cut in cuts)}


@pytest.mark.parametrize(
    "cuts", [("top_k",), ("top_p",), ("typical_p",), ("top_k", "top_p"), ("top_k", "top_p", "min_p")]
)
def test_of_tied_logits_none_is_missed(cuts):
    """On a coarse grid, as bfloat16 has for large logits, most borders run through tokens that tie. Then a move of
    1e-9, far below every other border here, parts them; and where it does not, no flip of size 0 may be reported."""
    rng = np.random.default_rng([7, *map(ord, "".join(cuts))])
    tied = 0
    for _ in range(150):
        logits = rng.integers(-2, 3, size=V) / 2  # five levels
        params, u = random_settings(rng, cuts), float(rng.random())
        flip = nearest(logits, params, u)
        flipped = flips(logits, params, u, 1e-9)
        if flipped:
            assert flip.size < 1e-9
        if (
            flip.size < 1e-9 and "typical_p" not in cuts
        ):  # two on either side of the entropy are not distinguished there
            assert flipped
            assert flip.step != "draw"
        tied += flipped
    assert tied >= 10


@pytest.mark.parametrize(
    ("logits", "settings", "u", "step", "token"),
    [
        ([1.0, 1.0, 1.0], {"top_k": 2}, 0.1, "top_k", 1),  # 1 and 2 may stay: the first one's interval is the second's
        ([1.0, 1.0, 1.0], {"top_p": 0.6}, 0.1, "top_p", 1),
        ([1.0, 1.0, 0.0], {"top_k": 1}, 0.5, "top_k", 1),
        ([2.0, 1.0, 1.0, 1.0], {"top_k": 3}, 0.72, "top_k", 2),  # 2 and 3 in place of 1 and 2
        ([0.0, 0.0, 0.0, 0.0], {"typical_p": 0.5}, 0.1, "typical", 1),
        ([0.0, 0.0, 0.0, 0.0], {"min_p": 1.0}, 0.1, "min_p", 1),
    ],
)
def test_ties_across_a_border_are_near_ties(logits, settings, u, step, token):
    entry = record_logits(logits, SamplingParams(temperature=1, **settings), uniforms=[u])[0]
    assert (entry.flip, entry.flip_step) == (0.0, step)
    assert entry.flip_token != entry.drawn
    assert entry.near_tie == "float32"
    moved = [
        decide(np.array(logits) + 1e-7 * np.array(signs), SamplingParams(temperature=1, **settings), u=u).token
        for signs in itertools.product((-1, 1), repeat=len(logits))
    ]
    assert {entry.drawn, token, entry.flip_token} <= set(moved)


@pytest.mark.parametrize("mask", [-50.0, -1e9, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_masked_logits_are_not_the_measure(mask, settings):
    """A rounding of 3 is at most 2**-8 * 3 = .012; one of a mask would be larger than any flip."""
    logits = np.full((1, 30), mask)
    logits[0, [4, 9]] = 3.0, 2.0
    entry = record_logits(logits, SamplingParams(**{"temperature": 1.0} | settings), uniforms=[0.5])[0]
    assert entry.size == 3
    assert entry.flip > 0.1
    assert entry.near_tie is None


def test_the_draw_alone_is_exact_however_far():
    """Log-odds move by twice the change, so this is exact: 1e-9 stands for rounding."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        logits, u = rng.normal(size=V) * 2, float(rng.random())
        for params in (SamplingParams(temperature=0.7), SamplingParams(temperature=0)):
            flip = nearest(logits, params, u)
            assert not flips(logits, params, u, (1 - 1e-9) * flip.size)
            assert flips(logits, params, u, (1 + 1e-9) * flip.size)


def test_the_token_that_comes_is_the_one_that_comes():
    rng = np.random.default_rng(4)
    for _ in range(60):
        logits, u = rng.normal(size=V) * 2, float(rng.random())
        params = SamplingParams(temperature=float(rng.choice([0.0, 0.8])))
        flip = nearest(logits, params, u)
        moved = [decide(logits + (1 + 1e-9) * flip.size * signs, params, PROMPT, OUTPUT, u).token for signs in SIGNS]
        assert set(moved) == {decide(logits, params, PROMPT, OUTPUT, u).token, flip.token}


def test_by_hand():
    """Two tokens of .6 and .4, u = .5: log-odds .405 from even, so .203 is the move; at T = 2 it is twice that."""
    odds = math.log(0.6 / 0.4)
    for T in (1.0, 2.0):
        flip = nearest(np.array([T * odds, 0.0, -np.inf, -np.inf, -np.inf]), SamplingParams(temperature=T), 0.5)
        assert math.isclose(flip.size, T * odds / 2, rel_tol=1e-14)
        assert (flip.step, flip.token) == ("draw", 1)
    greedy = nearest(np.array([1.0, 3.0, 2.5, 0.0, 0.0]), SamplingParams(temperature=0), 0.5)
    assert (greedy.size, greedy.step, greedy.token) == (0.25, "draw", 2)
    third = nearest(np.log([0.4, 0.3, 0.2999, 1e-5, 1e-5]), SamplingParams(temperature=1, top_k=2), 0.99)
    assert (third.step, third.token) == ("top_k", 2)
    assert math.isclose(third.size, math.log(0.3 / 0.2999) / 2, rel_tol=1e-9)


def log_odds(p):
    return math.log(p / (1 - p))


@pytest.mark.parametrize(
    ("settings", "u", "size", "token"),
    [
        ({"top_p": 0.81}, 0.95, (log_odds(0.81) - log_odds(0.8)) / 2, 1),  # the third goes once .8 has become .81
        ({"top_p": 0.79}, 0.55, (log_odds(0.8) - log_odds(0.79)) / 2, 1),  # comes in, and the first has .5, not .625
        ({"min_p": 0.39}, 0.95, math.log(0.4 / 0.39) / 2, 1),  # .2 is .4 of .5
        ({"min_p": 0.41}, 0.55, math.log(0.41 / 0.4) / 2, 1),
        ({"top_k": 2}, 0.99, math.log(0.3 / 0.2) / 2, 2),
    ],
)
def test_each_way_over_a_border_by_hand(settings, u, size, token):
    """p = .5 .3 .2: the last kept goes, the first removed comes in, or the two change places."""
    logits = np.array([*np.log([0.5, 0.3, 0.2]), -np.inf, -np.inf])
    flip = nearest(logits, SamplingParams(temperature=1, **settings), u)
    assert math.isclose(flip.size, size, rel_tol=1e-12)
    assert (flip.step, flip.token) == (next(iter(settings)), token)


def test_two_borders_at_once():
    """p = .3 .5 .31, the last two kept, u = .4 far below the end of the second's interval, .617. But once the first has
    taken the third's place, the second's interval begins at .375: first .0164 for that, which the .0527 from there to u
    includes."""
    flip = nearest(np.array([*np.log([0.3, 0.5, 0.31]), -np.inf, -np.inf]), SamplingParams(temperature=1, top_k=2), 0.4)
    assert math.isclose(flip.size, (log_odds(0.4) - log_odds(0.375)) / 2, rel_tol=1e-12)
    assert (flip.step, flip.token) == ("draw", 0)


def test_a_penalty_bends_the_slope():
    """A logit of 3 that was divided by 1.5 moves 1 where the model's moves 1.5; without that the size would be .25."""
    logits, params = np.array([3.0, 1.5, -9.0, -9.0, -9.0]), SamplingParams(temperature=0, repetition_penalty=1.5)
    flip = nearest_flip(logits, params, decide(logits, params, [0], (), record=True))
    assert math.isclose(flip.size, 0.5 / (1 + 1 / 1.5), rel_tol=1e-14)


def test_ties_and_the_lack_of_any_other_token():
    tie = nearest(np.array([2.0, 2.0, 0.0, 0.0, 0.0]), SamplingParams(temperature=0), 0.5)
    assert (tie.size, tie.token) == (0.0, 1)
    for params in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=1)):
        alone = nearest(np.array([2.0, *[-np.inf] * 4]), params, 0.5)
        assert (alone.size, alone.token) == (math.inf, None)
    assert nearest(np.zeros(5), SamplingParams(temperature=1.0), 0.0).size > 0.5  # u = 0 has nothing below it


@pytest.mark.parametrize(
    ("gap", "want"),
    [(0.0, "float32"), (2.0**-20, "float32"), (2.0**-19, "bfloat16"), (2.0**-4, "bfloat16"), (0.25, None)],
)
def test_near_ties_are_named_after_the_rounding_that_could_cause_them(gap, want):
    """Logits of size 16: a rounding is up to 2**-20 in float32, 2**-4 in bfloat16; a gap closes from both sides."""
    record = record_logits(np.array([16.0, 16.0 - 2 * gap, 1.0]), SamplingParams(temperature=0))
    entry = record[0]
    assert entry.size == 16
    assert entry.flip == gap
    assert entry.near_tie == want
    assert ("near-tie" in record.explain(0)) == (want is not None)
