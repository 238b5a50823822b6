"""All ten steps at once: their order, what the penalties look back over, and what is refused."""

import itertools

import numpy as np
import pytest

from refgemma.sampling import SamplingParams, decide, steps, steps_of

PROMPT, OUTPUT = [0, 1, 9], [2, 3, 3, 4, 9, 9]
SETTINGS = {
    "logit_bias": {1: 0.6, 5: -0.3, 3: 0.8},
    "banned": (7,),
    "repetition_penalty": 1.4,
    "frequency_penalty": 0.25,
    "presence_penalty": -0.3,
    "temperature": 1.4,
    "top_k": 8,
    "top_p": 0.9,
    "min_p": 0.2,
    "typical_p": 0.7,
}
STEPS = {
    "logit_bias": lambda x: steps.logit_bias(x, SETTINGS["logit_bias"]),
    "banned": lambda x: steps.banned(x, (7,)),
    "repetition_penalty": lambda x: steps.repetition_penalty(x, PROMPT + OUTPUT, 1.4),
    "frequency_penalty": lambda x: steps.frequency_penalty(x, OUTPUT, 0.25),
    "presence_penalty": lambda x: steps.presence_penalty(x, OUTPUT, -0.3),
    "temperature": lambda x: steps.temperature(x, 1.4),
    "top_k": lambda x: steps.top_k(x, 8),
    "top_p": lambda x: steps.top_p(x, 0.9),
    "min_p": lambda x: steps.min_p(x, 0.2),
    "typical": lambda x: steps.typical(x, 0.7),
}
# Two neighbours of which it does not matter which comes first, whatever the logits: a ban moves nobody else's logit,
# the penalties that subtract may subtract in any order, and a division changes nobody's rank.
COMMUTE = {
    ("logit_bias", "banned"),
    ("banned", "repetition_penalty"),
    ("frequency_penalty", "presence_penalty"),
    ("temperature", "top_k"),
}


def in_order(logits, names):
    """Probabilities after these steps, one after the other."""
    for name in names:
        logits = STEPS[name](logits)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_neighbouring_steps_swapped_give_another_answer_unless_they_commute():
    rng = np.random.default_rng(0)
    names, seen = list(STEPS), set()
    for _ in range(600):
        logits = rng.normal(size=12) * 2
        got = decide(logits, SamplingParams(**SETTINGS), PROMPT, OUTPUT).probs
        # A dozen operations on logits of size 8 in float64: far less than 1e-13, on either side of which nothing lies.
        assert np.abs(got - in_order(logits, names)).max() < 1e-13
        for i, pair in enumerate(itertools.pairwise(names)):
            swapped = [*names[:i], *pair[::-1], *names[i + 2 :]]
            if np.abs(got - in_order(logits, swapped)).max() > 1e-6:
                seen.add(pair)
    assert seen == set(itertools.pairwise(names)) - COMMUTE


def test_all_steps_stand_in_order_and_are_named_as_their_functions():
    names = [name for name, _ in steps_of(SamplingParams(**SETTINGS), PROMPT, OUTPUT)]
    assert names == list(STEPS)
    assert all(callable(getattr(steps, name)) for name in names)
    greedy = SamplingParams(**SETTINGS | {"temperature": 0})
    assert [name for name, _ in steps_of(greedy, PROMPT, OUTPUT)] == list(STEPS)[:5]


def test_bias_and_bans_reach_the_greedy_choice():
    logits = np.array([1.0, 3.0, 2.0])
    assert decide(logits, SamplingParams(temperature=0)).token == 1
    assert decide(logits, SamplingParams(temperature=0, banned=[1])).token == 2
    assert decide(logits, SamplingParams(temperature=0, logit_bias={0: 2.5})).token == 0


# ---- the window of the penalties


def changed(prompt, output, **settings):
    """Which tokens the penalties touch, and by how much their logits of 1 change."""
    decision = decide(np.ones(6), SamplingParams(temperature=1.0, **settings), prompt, output, record=True)
    logits = np.ones(6)
    for stage in decision.stages:
        logits[stage.ids] = stage.after
    return {i: float(value) for i, value in enumerate(logits) if value != 1}


def test_the_window_counts_from_the_end_of_prompt_and_output_for_repetition():
    prompt, output = [0, 1, 2], [3, 4]
    assert changed(prompt, output, repetition_penalty=2.0, penalty_window=3) == {2: 0.5, 3: 0.5, 4: 0.5}
    assert changed(prompt, output, repetition_penalty=2.0, penalty_window=1) == {4: 0.5}
    assert changed(prompt, [], repetition_penalty=2.0, penalty_window=2) == {1: 0.5, 2: 0.5}
    everything = changed(prompt, output, repetition_penalty=2.0)
    assert changed(prompt, output, repetition_penalty=2.0, penalty_window=5) == everything
    assert changed(prompt, output, repetition_penalty=2.0, penalty_window=99) == everything


def test_the_window_counts_from_the_end_of_the_output_for_the_others():
    prompt, output = [0, 1, 1], [2, 2, 3, 2, 4]
    assert changed(prompt, output, frequency_penalty=0.25, penalty_window=4) == {2: 0.5, 3: 0.75, 4: 0.75}
    assert changed(prompt, output, presence_penalty=0.25, penalty_window=2) == {2: 0.75, 4: 0.75}
    # llama.cpp's window reaches into the prompt here; refgemma's does not.
    assert changed(prompt, output, presence_penalty=0.25, penalty_window=7) == {2: 0.75, 3: 0.75, 4: 0.75}
    assert changed(prompt, [], frequency_penalty=0.25, penalty_window=2) == {}


# ---- what is refused


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_beyond_the_vocabulary_are_one_clear_sentence(temperature):
    for name, settings in {"banned": {"banned": [1, 3]}, "logit_bias": {"logit_bias": {3: 1.0}}}.items():
        with pytest.raises(ValueError, match=rf"^token id 3 of {name} is outside the vocabulary of 3 \(ids from 0\)$"):
            decide(np.zeros(3), SamplingParams(temperature=temperature, **settings))


def test_a_ban_of_everything_is_one_clear_sentence():
    with pytest.raises(
        ValueError, match=r"^banned holds every token that could be chosen: expected it to leave at least"
    ):
        decide(np.array([0.0, -np.inf, 1.0]), SamplingParams(banned=[0, 2]))


def test_a_bias_that_overflows_is_refused():
    with pytest.raises(ValueError, match=r"^logit_bias drives the logits out of the range of float64"):
        decide(np.array([1e308, 0.0]), SamplingParams(logit_bias={0: 1e308}))
