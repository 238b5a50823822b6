"""One decision: the order of the steps, which tokens they see, the record of what happened, and what is refused."""

import itertools
import math

import numpy as np
import pytest

from refgemma.sampling import SamplingParams, decide, steps
from refgemma.sampling.decision import steps_of

PLAIN = SamplingParams(temperature=1.0)


def logits_of(*probs):
    """Logits of these probabilities."""
    with np.errstate(divide="ignore"):
        return np.log(np.array(probs, dtype=np.float64))


def distribution(logits, prompt=(), output=(), **settings):
    """Probabilities that a token is drawn from."""
    return decide(logits, SamplingParams(**{"temperature": 1.0} | settings), prompt, output).probs


# ---- the order of the steps

PROMPT, OUTPUT = [0, 1, 5], [2, 2, 3, 4, 4, 4, 5]
LOGITS = np.array([1.7, 0.1, 1.5, 0.4, 2.6, 1.0, -1.2, 1.7])  # found by search: every wrong order is seen
SETTINGS = {
    "temperature": 1.7,
    "top_k": 5,
    "top_p": 0.8,
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.4,
    "presence_penalty": 0.3,
}


def in_order(names):
    """Probabilities after these steps, one after the other."""
    step = {
        "repetition_penalty": lambda x: steps.repetition_penalty(x, PROMPT + OUTPUT, 1.3),
        "frequency_penalty": lambda x: steps.frequency_penalty(x, OUTPUT, 0.4),
        "presence_penalty": lambda x: steps.presence_penalty(x, OUTPUT, 0.3),
        "temperature": lambda x: steps.temperature(x, 1.7),
        "top_k": lambda x: steps.top_k(x, 5),
        "top_p": lambda x: steps.top_p(x, 0.8),
    }
    x = LOGITS
    for name in names:
        x = step[name](x)
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def test_the_order_of_the_steps_is_the_only_one_that_gives_this_answer():
    """Repetition; frequency, presence; temperature, top-k; top-p: each pair may be swapped, and nothing else may."""
    got = distribution(LOGITS, PROMPT, OUTPUT, **SETTINGS)
    # A dozen operations in float64 on logits of size 3: 1e-14 is more than rounding, and less than any wrong order.
    same = {names for names in itertools.permutations(RANK) if np.abs(in_order(names) - got).max() < 1e-14}
    allowed = {names for names in itertools.permutations(RANK) if [RANK[n] for n in names] == sorted(RANK.values())}
    assert same == allowed
    assert len(allowed) == 4


RANK = {
    "repetition_penalty": 0,
    "frequency_penalty": 1,
    "presence_penalty": 1,
    "temperature": 2,
    "top_k": 2,
    "top_p": 3,
}


def test_steps_that_are_off_are_not_taken():
    assert steps_of(SamplingParams(temperature=1.0), PROMPT, OUTPUT) == []
    assert [name for name, _ in steps_of(SamplingParams(**SETTINGS), PROMPT, OUTPUT)] == [
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "temperature",
        "top_k",
        "top_p",
    ]
    greedy = SamplingParams(**SETTINGS | {"temperature": 0})
    assert [name for name, _ in steps_of(greedy, PROMPT, OUTPUT)] == [
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
    ]


def test_top_k_then_top_p_of_the_rest():
    """p = .1 .2 .3 .4, k = 2, P = .5: transformers and vLLM keep .4 alone, gemma_pytorch .3 as well."""
    decision = decide(logits_of(0.1, 0.2, 0.3, 0.4), SamplingParams(temperature=1.0, top_k=2, top_p=0.5))
    assert decision.kept.tolist() == [3]
    assert decision.probs.tolist() == [0, 0, 0, 1]


def test_temperature_comes_before_top_p():
    """p = .6 .3 .1 at T = 2 is .473 .334 .193, so P = .6 keeps two; llama.cpp, whose temperature is last, keeps one."""
    decision = decide(logits_of(0.6, 0.3, 0.1), SamplingParams(temperature=2.0, top_p=0.6))
    assert decision.kept.tolist() == [0, 1]
    root = math.sqrt(0.6) + math.sqrt(0.3)
    # log, division, exp and two sums: less than ten roundings each of 2**-53.
    assert np.allclose(decision.probs, [math.sqrt(0.6) / root, math.sqrt(0.3) / root, 0], rtol=0, atol=1e-15)


# ---- which tokens the penalties see


def test_repetition_penalty_sees_prompt_and_output_the_others_the_output_alone():
    logits = np.zeros(5) + 1.0
    prompt, output = [0, 1, 1], [1, 2, 2]

    def change(**settings):
        stages = decide(logits, SamplingParams(temperature=1.0, **settings), prompt, output, record=True).stages
        out = logits.copy()
        for stage in stages:
            out[stage.ids] = stage.after
        return out.tolist()

    assert change(repetition_penalty=2.0) == [0.5, 0.5, 0.5, 1, 1]
    assert change(frequency_penalty=0.25) == [1, 0.75, 0.5, 1, 1]  # with the prompt it would be .75 .25 .5
    assert change(presence_penalty=0.25) == [1, 0.75, 0.75, 1, 1]  # with the prompt token 0 would lose as well


# ---- greedy


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-30, 9.99e-6])
def test_no_temperature_takes_the_most_likely_lowest_id_first(temperature):
    logits = np.array([1.0, 3.0, 2.0, 3.0])
    for u in (0.0, 0.5, 0.999):
        decision = decide(logits, SamplingParams(temperature=temperature, top_k=3, top_p=0.9), u=u)
        assert decision.token == 1
        assert decision.probs.tolist() == [0, 1, 0, 0]
        assert decision.kept.tolist() == [1]


def test_a_temperature_of_1e_5_still_draws():
    decision = decide(np.array([1.0, 3.0, 2.0, 3.0]), SamplingParams(temperature=1e-5), u=0.9)
    assert decision.token == 3
    assert decision.probs.tolist() == [0, 0.5, 0, 0.5]


def test_greedy_comes_after_the_penalties():
    logits = np.array([1.0, 1.2, 0.5])
    for name in ("frequency_penalty", "presence_penalty"):
        assert decide(logits, SamplingParams(temperature=0, **{name: 0.5}), [], [1]).token == 0
        assert (
            decide(logits, SamplingParams(temperature=0, **{name: 0.5}), [1], []).token == 1
        )  # the prompt is not output
    assert decide(logits, SamplingParams(temperature=0, repetition_penalty=1.5), [1], []).token == 0


# ---- the record


def test_record_holds_what_each_step_changed_and_replays():
    decision = decide(LOGITS, SamplingParams(**SETTINGS), PROMPT, OUTPUT, u=0.4, record=True)
    assert [stage.name for stage in decision.stages] == list(RANK)
    current = LOGITS.copy()
    for stage in decision.stages:
        assert np.array_equal(current[stage.ids], stage.before)
        assert np.all(stage.before != stage.after)
        current[stage.ids] = stage.after
    assert np.flatnonzero(current > -np.inf).tolist() == decision.kept.tolist()
    weights = np.exp(current - current.max())
    assert np.array_equal(weights / weights.sum(), decision.probs)
    assert decision.stages[1].ids.tolist() == [2, 3, 4, 5]
    again = decide(LOGITS, SamplingParams(**SETTINGS), PROMPT, OUTPUT, u=decision.u)
    assert again.token == decision.token
    assert again.stages == ()


def test_decision_has_the_promised_types():
    for temperature in (0.0, 1.0):
        decision = decide(np.float32([1, 2]), SamplingParams(temperature=temperature), u=np.float32(0.25))
        assert type(decision.token) is int
        assert type(decision.u) is float
        assert decision.probs.dtype == np.float64
        assert decision.kept.dtype.kind == "i"


# ---- input


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_logits_of_any_real_dtype(dtype):
    logits = np.array([3, 1, 2], dtype=dtype)
    assert np.array_equal(decide(logits, PLAIN).probs, decide(logits.astype(np.float64), PLAIN).probs)
    assert decide([3, 1, 2], PLAIN).token == 0


def test_logits_are_left_alone():
    logits = LOGITS.copy()
    decide(logits, SamplingParams(**SETTINGS), PROMPT, OUTPUT, record=True)
    assert np.array_equal(logits, LOGITS)


def test_token_ids_may_be_arrays():
    settings = SamplingParams(**SETTINGS)
    want = decide(LOGITS, settings, PROMPT, OUTPUT)
    got = decide(LOGITS, settings, np.array(PROMPT), np.array(OUTPUT, dtype=np.int32))
    assert np.array_equal(got.probs, want.probs)
    assert np.array_equal(decide(LOGITS, settings, np.array([], dtype=int), ()).probs, decide(LOGITS, settings).probs)


@pytest.mark.parametrize(
    ("logits", "reason"),
    [
        (np.array([1.0, np.nan, np.inf]), r"^logits hold NaN, first for token 1: "),
        (np.full(3, -np.inf), r"^logits are all minus infinity: "),
        (np.array([0.0, 0.0, np.inf]), r"^logits are plus infinity for token 2: "),
        (np.zeros(0), r"^logits are float64 of shape \(0,\): expected one number per vocabulary entry, \(V,\)"),
        (np.zeros((1, 3)), r"of shape \(1, 3\): expected"),
        (np.float64(1.0), r"of shape \(\): expected"),
        (np.zeros(3, dtype=bool), r"^logits are bool"),
        (np.zeros(3, dtype=complex), r"^logits are complex128"),
        (np.array(["1", "2"]), r"^logits are <U1"),
    ],
)
def test_bad_logits_are_one_clear_sentence(logits, reason):
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match=reason) as caught:
            decide(logits, SamplingParams(temperature=temperature))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("u", [1.0, -1e-300, 1.5, float("nan"), float("inf")])
def test_bad_u_is_refused(u):
    with pytest.raises(ValueError, match=r"^u is .*: expected a number in \[0, 1\)"):
        decide(np.zeros(3), PLAIN, u=u)


@pytest.mark.parametrize("which", ["prompt_tokens", "output_tokens"])
@pytest.mark.parametrize("settings", [PLAIN, SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0)])
def test_bad_token_ids_are_refused(which, settings):
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=rf"^token id {bad} of {which} is outside the vocabulary of 3"):
            decide(np.zeros(3), settings, **{which: [0, bad]})
    for bad in ([1.5], ["1"], "12", None, [[1]], np.array([1.0]), 5):
        with pytest.raises(TypeError, match=rf"^{which} are .*: expected a list of token ids"):
            decide(np.zeros(3), settings, **{which: bad})


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1e-305}, {"frequency_penalty": -1e308}, {"presence_penalty": -1.5e308}],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_settings_that_overflow_are_refused(settings, temperature):
    """Not NaN, and not the token that NaN happens to give."""
    logits = np.array([1e10, 1.0, 1e308])
    with pytest.raises(ValueError, match="drives the logits out of the range of float64"):
        decide(logits, SamplingParams(temperature=temperature, **settings), (), [0, 0, 2])
