"""The most likely tokens of a large vocabulary, found without looking at all of them: as a full sort has them."""

import numpy as np
import pytest

from refgemma.sampling import SamplingParams, decide, steps
from refgemma.sampling.steps import largest, left

V = 3 * steps._ROWS * steps._GROUPS + 17  # large enough for the short cut, and not a whole number of groups

KINDS = {
    "any": lambda rng: rng.normal(size=V),
    "ascending": lambda rng: np.arange(V) / 1000,  # the largest are in the rest that fills no group
    "descending": lambda rng: -np.arange(V) / 1000,
    "ties": lambda rng: rng.integers(-20, 20, size=V) / 4,
    "few values": lambda rng: np.where(rng.random(V) < 1e-3, 1.0, 0.0),  # more than wanted, or all, at the border
    "flat": lambda rng: np.zeros(V),
    "one": lambda rng: np.where(np.arange(V) == V - 3, 1.0, 0.0),
}


@pytest.mark.parametrize("count", [1, 20, 1024, 5000, V - 1, V])
@pytest.mark.parametrize("kind", KINDS)
def test_largest_is_the_head_of_a_stable_sort(kind, count):
    values = KINDS[kind](np.random.default_rng(count))
    want = np.sort(np.argsort(-values, kind="stable")[:count])  # lower places where numbers tie
    assert np.array_equal(np.sort(largest(values, count)), want)


def test_the_short_cut_is_taken(monkeypatch):
    """Else the test above would say nothing of it: of many numbers, no full partition is made."""
    seen = []
    plain = np.partition
    monkeypatch.setattr(np, "partition", lambda values, kth: seen.append(len(values)) or plain(values, kth))
    largest(KINDS["any"](np.random.default_rng(1)), 20)
    assert max(seen) == steps._GROUPS
    seen.clear()
    largest(np.zeros(V), 20)
    assert max(seen) == V


def test_ids_are_shared_and_cannot_be_written_to():
    ids, _ = left(np.zeros(9))
    assert ids is left(np.ones(9))[0]
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_running_sums_of_a_decision_are_those_of_its_probabilities():
    logits = np.random.default_rng(2).normal(size=50)
    for settings in ({}, {"top_k": 7}, {"temperature": 0.0}):
        decision = decide(logits, SamplingParams(**settings), u=0.4)
        assert np.array_equal(decision.running, np.cumsum(decision.probs[decision.kept]))
