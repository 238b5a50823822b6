"""Replay: the same tokens from the same record; with another setting the first that differs, and the reason."""

import numpy as np
import pytest

from refgemma.sampling import SamplingParams, decide, record_logits, uniform

RNG = np.random.default_rng(9)
LOGITS = RNG.normal(size=(12, 60)).astype(np.float32) * 2
SETTINGS = {
    "temperature": 0.9,
    "top_k": 30,
    "top_p": 0.9,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.3,
    "seed": 5,
}
RECORD = record_logits(LOGITS, SamplingParams(**SETTINGS), prompt_tokens=[1, 2, 3])


def test_the_same_settings_give_the_same_tokens():
    replay = RECORD.replay()
    assert replay.tokens == RECORD.tokens
    assert replay.first_difference is None
    assert replay.reason == "All 12 tokens come out as recorded."
    assert replay.params == RECORD.params
    assert RECORD.replay(temperature=0.9, top_k=30).reason == replay.reason


def test_a_change_without_effect_says_so():
    assert RECORD.replay(min_p=1e-9).reason == "All 12 tokens come out as recorded with min_p 1e-09 in place of None."


CHANGES = [
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 3.0, "top_p": None},
    {"top_k": 1},
    {"top_k": None, "top_p": 1.0},
    {"top_p": 0.3},
    {"min_p": 0.5},
    {"typical_p": 0.2},
    {"repetition_penalty": 1.0},
    {"frequency_penalty": -2.0},
    {"presence_penalty": -3.0},
    {"logit_bias": {7: 9.0}},
    {"banned": [RECORD.tokens[0]]},
    {"seed": 6},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_change_gives_the_first_token_that_differs(changes):
    """The tokens before it were recorded and are fed to the penalties; each is what these settings choose."""
    params = SamplingParams(**SETTINGS | changes)
    want = []
    for t, recorded in enumerate(RECORD.tokens):
        u = uniform(params.seed, t)
        want.append(decide(LOGITS[t], params, [1, 2, 3], RECORD.tokens[:t], u).token)
        if want[-1] != recorded:
            break
    replay = RECORD.replay(**changes)
    assert replay.tokens == tuple(want)
    assert replay.first_difference == len(want) - 1
    assert want[-1] != RECORD.tokens[len(want) - 1]  # every change in the list has an effect
    t = replay.first_difference
    assert replay.reason.startswith(f"Token {t} is token {want[-1]} and not token {RECORD.tokens[t]} with ")
    for name, value in changes.items():
        assert f"{name} {getattr(params, name)} in place of {getattr(RECORD.params, name)}" in replay.reason, value
    follows = "The logits recorded after it follow the recorded token, not this one" in replay.reason
    assert follows == (t + 1 < len(RECORD))
    assert "\n" not in replay.reason


WORKED = np.log([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("settings", "u", "changes", "reason"),
    [
        ({"temperature": 1}, 0.95, {"top_k": 2}, "token 3 was removed by top_k: it was number 4 of those left, and"),
        ({"temperature": 1}, 0.5, {"temperature": 0}, "token 1 was never removed, but its logit is 0.2877 below"),
        ({"temperature": 1, "top_k": 2}, 0.9, {"top_k": None},
         "In the record, token 3 was removed by top_k: it was number 4"),
        ({"temperature": 0}, 0.5, {"temperature": 1}, "In the record, token 1 was never removed, but its logit is"),
        ({"temperature": 1}, 0.41, {"logit_bias": {0: 0.5}},
         "The interval of token 1 moved from [0.40000000, 0.70000000) to [0.52361614, 0.76180807); u = 0.41000000 "
         "falls into [0.00000000, 0.52361614), that of token 0."),
    ],
)  # fmt: skip
def test_the_reason_names_what_made_the_difference(settings, u, changes, reason):
    replay = record_logits(WORKED, SamplingParams(**settings), uniforms=[u]).replay(**changes)
    assert replay.first_difference == 0
    assert reason in replay.reason
    assert "recorded after it" not in replay.reason  # it is the last


def test_another_seed_tells_both_uniform_numbers():
    record = record_logits([WORKED] * 4, SamplingParams(temperature=1, seed=7))
    reason = record.replay(seed=8).reason
    assert "The interval of token 3 is [0.90000000, 1.00000000)" not in reason  # u = .872 is token 2's
    assert "The interval of token 2 is [0.70000000, 0.90000000); u is now " in reason
    assert "no longer 0.87207345, and falls into" in reason


def test_a_record_with_its_own_uniform_numbers_keeps_them_unless_the_seed_changes():
    record = record_logits([WORKED] * 3, SamplingParams(temperature=1, seed=7), uniforms=[0.05, 0.5, 0.95])
    assert record.tokens == (0, 1, 3)
    assert record.replay().tokens == (0, 1, 3)
    assert record.replay(temperature=1.01).tokens == (0, 1, 3)
    assert record.replay(seed=7).tokens == (2,)  # uniform(7, 0) is .872


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_tokens": 5}, "^max_tokens plays no part in a decision: a replay takes temperature, "),
        ({"stop": "x"}, "^stop plays no part in a decision: a replay takes temperature, "),
        ({"top_q": 5}, "^unknown setting 'top_q': a replay takes temperature, "),
        ({"seed": None}, "^seed is None: a replay needs a number, "),
        ({"top_k": 0}, "^top_k is 0: expected a whole number of at least 1"),
        ({"banned": [60]}, "^token id 60 of banned is outside the vocabulary of 60"),
    ],
)
def test_changes_that_cannot_be_made_are_one_clear_sentence(changes, reason):
    with pytest.raises(ValueError, match=reason):
        RECORD.replay(**changes)


def test_tokens_of_another_engine_are_not_blamed_on_the_change():
    """The record's own settings give token 0, so min-p has no part in it."""
    settings = SamplingParams(temperature=1, top_k=2)
    record = record_logits([3.0, 0.0, 0.0], settings, tokens=[2], uniforms=[0.1])
    for changes in ({}, {"min_p": 0.0001}):
        replay = record.replay(**changes)
        assert (replay.tokens, replay.first_difference) == ((0,), 0)
        assert replay.reason.startswith(
            "Token 0 is token 0 and not token 2, with the recorded settings already: another engine or other settings "
            "must have chosen token 2. token 2 was removed by top_k: "
        )
        assert "min_p" not in replay.reason


def test_where_record_settings_and_change_give_three_tokens_all_are_named():
    record = record_logits(WORKED, SamplingParams(temperature=1), tokens=[2], uniforms=[0.5])
    reason = record.replay(logit_bias={3: 9.0}).reason
    assert reason.startswith("Token 0 is token 3 and not token 2 with logit_bias ((3, 9.0),) in place of (). ")
    assert "The recorded settings give neither but token 1: another engine or other settings must have" in reason
