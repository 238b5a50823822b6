"""Every known bug in the reference against the same bug in the truth written by hand, alone and in pairs."""

import re
from itertools import combinations

import numpy as np
import pytest

from refgemma.numerics import FLOAT32, FLOAT64, PROFILES
from refgemma.oracle.bugs import port
from refgemma.oracle.bugs.catalogue import BUGS, find, with_bugs
from refgemma.oracle.bugs.port import Setup, run
from refgemma.oracle.operations import FIRST, IN_LAYER, LAST
from tests.judge import FLOAT64_BOUND, error
from tests.models import random_model, widened
from tests.oracle.publish import BUGS_PAGE, bugs_page
from tests.truth import BUGS as TRUTH_BUGS
from tests.truth import truth_logits

# Kinds of visibility that the catalogue of known bugs gives, and what of each a trace can show.
IN_FLOAT32 = ["A1", "A3", "A4", "A5", "B1", "B2", "B8", "B9", "C1", "C2", "C3", "D2", "D7", "D9", "E2", "E6"]
IN_BFLOAT16 = ["A2", "B4", "B5", "B6", "D1", "G1"]
FAR, IN_TOKENS = ["D3"], ["H1"]


def setup_of(model, **fields):
    """A random model as a setup in float64."""
    parts = {"params": widened(model.params), "config": model.config}
    return Setup(**(parts | {"tokens": model.tokens, "positions": model.positions} | fields))


def model_for(*bugs):
    """First random model in which each of these bugs shows, padded on the left only."""
    for seed in range(200):
        model = random_model(seed, num_tokens=9)
        real = model.positions >= 0
        left_only = not np.any(real[:, :-1] & ~real[:, 1:])
        honest = setup_of(model)
        if left_only and all(find(bug).setups(honest) for bug in bugs):
            plain = truth_logits(model.params, model.config, model.tokens, model.positions)
            wrong = [
                truth_logits(model.params, model.config, model.tokens, model.positions, bugs={bug}) for bug in bugs
            ]
            if all(error(one, plain) > 1e-6 for one in wrong):
                return model
    raise AssertionError(f"{bugs} shows in none of the models")


def test_the_table_is_whole():
    keys = [bug.key for bug in BUGS]
    assert len(set(keys)) == len(keys)
    assert {key.split()[0] for key in keys} == {*IN_FLOAT32, *IN_BFLOAT16, *FAR, *IN_TOKENS}
    for bug in BUGS:
        assert re.fullmatch(r"https://[\w./-]+", bug.thread), bug.key
        assert bug.sentence.endswith(".")
        assert set(bug.where) <= {*FIRST, *IN_LAYER, *LAST}
        assert bool(bug.where) == (bug.kind != "tokens")
        assert find(bug.key) is bug
    with pytest.raises(ValueError, match=r"unknown bug 'Z9': expected one of A1, A2"):
        find("Z9")


@pytest.mark.parametrize("bug", sorted(set(TRUTH_BUGS) - {"A5"}))
def test_a_bug_in_the_reference_is_the_bug_in_the_truth(bug):
    model = model_for(bug)
    want = truth_logits(model.params, model.config, model.tokens, model.positions, bugs={bug})
    setups = find(bug).setups(setup_of(model))
    assert setups
    for setup in setups:
        assert error(run(setup), want) <= FLOAT64_BOUND


@pytest.mark.parametrize(
    "pair", [*combinations(("B1", "B8", "B9", "B9 1e-5"), 2), ("D2", "D7"), ("D7", "E6"), ("C1", "C3"), ("A1", "A3")]
)
def test_two_bugs_in_the_reference_are_both_in_the_truth(pair):
    """Also where both change one operation."""
    model = model_for(*pair)
    want = truth_logits(model.params, model.config, model.tokens, model.positions, bugs=set(pair))
    for order in (pair, pair[::-1]):
        for setup in with_bugs(setup_of(model), [find(key) for key in order]):
            assert error(run(setup), want) <= FLOAT64_BOUND
    one = truth_logits(model.params, model.config, model.tokens, model.positions, bugs={pair[0]})
    assert error(one, want) > 1e-9  # it can fail: one bug is not both


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.key)
def test_a_run_in_chunks_is_the_run_in_one(bug, monkeypatch):
    model = random_model(8, num_tokens=9)
    narrow = bug.key == "G1"
    honest = setup_of(model, numerics=PROFILES["bf16-transformers"], params=model.params) if narrow else setup_of(model)
    whole = [(setup, run(setup)) for setup in bug.setups(honest)]
    monkeypatch.setattr(port, "CHUNK", 4)
    for setup, want in whole:
        if narrow:  # only this one makes cached and full runs differ
            assert error(run(setup), want) > 1e-4
        else:  # where values are rounded, sums of two lengths may fall on two sides of a midpoint
            assert error(run(setup), want) <= (1e-2 if bug.kind == "rounding" else FLOAT64_BOUND)


def test_the_page_of_the_catalogue_is_its_table():
    assert BUGS_PAGE.read_text(encoding="utf-8") == bugs_page()  # else run `python -m tests.oracle.publish`
    assert all(f"| {bug.key} | **{bug.title}.** " in bugs_page() for bug in BUGS)


def test_an_honest_setup_is_the_reference():
    model = random_model(5)
    for numerics in (FLOAT64, FLOAT32):
        params = widened(model.params) if numerics is FLOAT64 else model.params
        plain = run(Setup(params=params, config=model.config, tokens=model.tokens, positions=model.positions,
                          numerics=numerics))  # fmt: skip
        want = truth_logits(model.params, model.config, model.tokens, model.positions)
        assert error(plain, want) <= (FLOAT64_BOUND if numerics is FLOAT64 else 1e-4)


def test_a_bug_that_cannot_show_gives_nothing():
    single = setup_of(random_model(0, num_tokens=6))  # K = 1
    shown = {bug.key for bug in BUGS if bug.setups(single)}
    near = single.but(positions=np.broadcast_to(np.arange(6), single.tokens.shape))
    assert "E6" not in shown
    assert "A5" not in shown
    assert "G1" not in shown
    assert not find("D2").setups(near)
    assert not find("D3").setups(near)
    assert not find("D9").setups(near)
    assert find("D2").setups(near.but(positions=near.positions + 300))
    assert find("D3").setups(near.but(positions=near.positions + 8190))
    assert find("G1").setups(near.but(numerics=PROFILES["bf16-transformers"]))
    assert not find("H1 missing").setups(near.but(tokens=near.tokens[:, :1], positions=near.positions[:, :1]))


def test_the_first_token_is_left_out_or_doubled_behind_its_padding():
    model = random_model(0)
    tokens = np.array([[2, 5, 6, 7], [0, 2, 8, 9], [2, 8, 0, 0]])
    positions = np.array([[300, 301, 302, 303], [-1, 0, 1, 2], [0, 1, -1, -1]])
    setup = setup_of(model, tokens=tokens, positions=positions)
    (missing,) = find("H1 missing").setups(setup)
    assert missing.tokens.tolist() == [[5, 6, 7], [0, 8, 9], [8, 0, 0]]
    assert missing.positions.tolist() == [[300, 301, 302], [-1, 0, 1], [0, -1, -1]]
    (double,) = find("H1 double").setups(setup)
    assert double.tokens.tolist() == [[2, 2, 5, 6, 7], [0, 2, 2, 8, 9], [2, 2, 8, 0, 0]]
    assert double.positions.tolist() == [[300, 301, 302, 303, 304], [-1, 0, 1, 2, 3], [0, 1, 2, -1, -1]]


def test_a_scale_that_is_rounded_is_switched_off_and_on():
    model = random_model(3)
    (narrow,) = find("A2").setups(setup_of(model))
    assert narrow.numerics.rounding == {"embed.scale": "bfloat16"}
    (exact,) = find("A2").setups(narrow)
    assert not exact.numerics.rounding
