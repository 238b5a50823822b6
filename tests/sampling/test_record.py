"""The record: what it says of a decision, against the same worked out by hand; its words; records of other engines."""

import math
import re

import numpy as np
import pytest

from refgemma.sampling import Record, SamplingParams, decide, read_record, record_logits, uniform

PIECES = ["<bos>", "▁cat", "▁dog", "▁cow", "s", "▁'quote'"]


def piece(token):
    return PIECES[token] if token < len(PIECES) else ""


def logits_of(*probs):
    with np.errstate(divide="ignore"):
        return np.log(np.array(probs, dtype=np.float64))


WORKED = logits_of(0.4, 0.3, 0.2, 0.06, 0.04, 0.0)


def worked(u=0.5, **settings):
    """A record of one decision on the worked example."""
    settings = SamplingParams(**{"temperature": 1.0} | settings)
    return record_logits(WORKED, settings, uniforms=[u], piece=piece)


def close(a, b):
    """A few roundings in float64 apart."""
    return math.isclose(a, b, rel_tol=1e-13, abs_tol=1e-15)


def test_worked_example():
    """p = .4 .3 .2 .06 .04: top-k 4 leaves .96, of which top-p .7 keeps .4 and .3; u = .5 is in the first's 4 / 7."""
    [entry] = worked(top_k=4, top_p=0.7)
    assert (entry.t, entry.token, entry.drawn, entry.u, entry.rank, entry.kept) == (0, 0, 0, 0.5, 0, 2)
    assert entry.interval[0] == 0
    assert close(entry.interval[1], 4 / 7)
    assert close(entry.raw_logprob, math.log(0.4))
    assert close(entry.logprob, math.log(4 / 7))
    assert close(entry.raw_entropy, -sum(p * math.log(p) for p in (0.4, 0.3, 0.2, 0.06, 0.04)))
    assert close(entry.entropy, -sum(p * math.log(p) for p in (4 / 7, 3 / 7)))
    top_k, top_p = entry.steps
    assert (top_k.name, top_k.value, top_k.removed, top_k.last_kept, top_k.first_removed) == ("top_k", 4, 1, 3, 4)
    assert close(top_k.mass, 0.04)
    assert close(top_k.margin, math.log(0.06 / 0.04))
    assert close(top_k.log_total, math.log(0.96))
    assert (top_p.name, top_p.value, top_p.removed, top_p.last_kept, top_p.first_removed) == ("top_p", 0.7, 2, 1, 2)
    assert close(top_p.mass, 0.26 / 0.96)  # of what top-k left, not of all
    assert close(top_p.margin, math.log(0.3 / 0.2))
    assert close(top_p.entropy, entry.entropy)
    assert [c.id for c in entry.candidates] == [0, 1, 2, 3, 4, 5]
    assert [c.logits[0] is None for c in entry.candidates] == [False, False, False, False, True, True]
    assert [c.logits[1] is None for c in entry.candidates] == [False, False, True, True, True, True]
    assert [c.raw for c in entry.candidates] == [*WORKED[:5].tolist(), None]
    assert all(map(close, [c.raw_prob for c in entry.candidates], (0.4, 0.3, 0.2, 0.06, 0.04, 0)))
    assert all(map(close, [c.prob for c in entry.candidates], (4 / 7, 3 / 7, 0, 0, 0, 0)))
    # The mass of the first two, .7 of .96, need only sink to .7 of all for the third to come in and take its share:
    # half the log-odds between. The end of the first one's interval is further from u: that of 4 / 7 against .5.
    assert close(entry.flip, (math.log(0.7 / 0.26) - math.log(0.7 / 0.3)) / 2)
    assert entry.flip < math.log(4 / 3) / 2
    assert (entry.flip_step, entry.flip_token, entry.near_tie) == ("top_p", 1, None)


def test_steps_that_change_logits_list_what_they_change():
    settings = SamplingParams(
        temperature=2.0, logit_bias={1: 1.0, 5: 3.0}, banned=[3, 5], repetition_penalty=2.0, presence_penalty=0.5
    )
    [_, entry] = record_logits([WORKED, WORKED], settings, prompt_tokens=[0], uniforms=[0, 0], tokens=[2, 1])
    bias, banned, repetition, presence, temperature = entry.steps
    assert (bias.ids, bias.before, bias.after) == ((1,), (WORKED[1],), (WORKED[1] + 1,))  # -inf + 3 changes nothing
    assert (banned.ids, banned.before, banned.after) == ((3,), (WORKED[3],), (None,))
    assert (banned.removed, banned.margin) == (1, None)
    assert close(banned.mass, 0.06 / (0.94 - 0.3 + 0.3 * math.e + 0.06))
    assert repetition.ids == (0, 2)
    assert repetition.after == (2 * WORKED[0], 2 * WORKED[2])
    assert (presence.ids, presence.removed) == ((2,), 0)
    assert (temperature.ids, temperature.value) == ((), 2.0)
    assert close(entry.candidates[0].logits[4], 2 * WORKED[0] / 2)


def test_probabilities_of_candidates_follow_at_every_step():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=300) * 3
    record = record_logits(
        logits, SamplingParams(temperature=0.7, top_k=80, min_p=0.01, typical_p=0.9, top_p=0.97, seed=1)
    )
    [entry] = record
    stages = record.decision(0).stages
    for i, (step, stage) in enumerate(zip(entry.steps, stages, strict=True)):
        probs = np.exp(stage.logits_after - stage.logits_after.max())
        probs /= probs.sum()
        for candidate in entry.candidates:
            after = candidate.logits[i]
            got = 0.0 if after is None else math.exp(after - step.log_total)
            assert math.isclose(got, probs[candidate.id], rel_tol=1e-12)
        before = np.exp(stage.logits_before - stage.logits_before.max())
        gone = (stage.logits_after == -np.inf) & (stage.logits_before > -np.inf)
        assert step.removed == gone.sum()
        assert math.isclose(step.mass, before[gone].sum() / before.sum(), rel_tol=1e-12)
        assert math.isclose(step.entropy, -(probs[probs > 0] * np.log(probs[probs > 0])).sum(), rel_tol=1e-12)
    assert sum(step.removed > 0 for step in entry.steps) == 4
    ids = {candidate.id for candidate in entry.candidates}
    assert ids >= {*np.argsort(-logits)[:20].tolist(), entry.token}
    assert ids >= {i for step in entry.steps[1:] for i in (step.last_kept, step.first_removed)}
    assert [c.raw for c in entry.candidates] == sorted((c.raw for c in entry.candidates), reverse=True)


def test_u_lies_in_the_interval_and_the_interval_is_as_long_as_the_probability():
    rng = np.random.default_rng(6)
    record = record_logits(rng.normal(size=(200, 50)) * 2, SamplingParams(temperature=0.9, top_p=0.95, seed=3))
    for t, entry in enumerate(record):
        low, high = entry.interval
        assert low <= entry.u < high
        assert entry.u == uniform(3, t)
        assert abs((high - low) - math.exp(entry.logprob)) < 50 * 2**-52  # a running sum of 50
        assert entry.token == entry.drawn == decide(record.logits[t], record.params, u=entry.u).token


def test_typical_margin_is_a_difference_of_distances():
    """p = .4 .3 .2 .1, entropy 1.280: distances .364 .076 .330 1.023; typical .49 keeps .3 and .2."""
    [entry] = record_logits(
        logits_of(0.4, 0.3, 0.2, 0.1), SamplingParams(temperature=1.0, typical_p=0.49), uniforms=[0.1]
    )
    [step] = entry.steps
    assert (step.last_kept, step.first_removed) == (2, 0)
    entropy = -sum(p * math.log(p) for p in (0.4, 0.3, 0.2, 0.1))
    assert close(step.margin, (entropy + math.log(0.4)) - (-math.log(0.2) - entropy))


def test_greedy():
    [entry] = worked(temperature=0)
    assert (entry.token, entry.logprob, entry.entropy, entry.interval, entry.kept) == (0, 0.0, 0.0, (0.0, 1.0), 1)
    assert close(entry.flip, math.log(4 / 3) / 2)


# ---- words


def test_explain():
    text = worked(top_k=4, top_p=0.7).explain(0)
    assert text.startswith(
        "Token 0 is '<bos>' (0), the most likely before all steps: probability 0.4 there, 0.57143 after"
    )
    assert (
        "top_k 4 removed 1 token, with 4 % of the probability: the last kept was ' cow' (3), the first removed" in text
    )
    assert "top_p 0.7 removed 2 tokens, with 27.1 % of the probability: the last kept was ' cat' (1)" in text
    assert "2 tokens were left (entropy 0.683 nats, 1.347 before all steps), and u = 0.50000000 fell into its" in text
    assert "[0.00000000, 0.57142857)" in text
    assert (
        "The smallest change of the logits that gives another token is about 0.0716: then ' cat' (1) comes, at top_p"
        in text
    )
    assert "\n" not in text
    assert "number 3 by likelihood" in worked(u=0.8).explain(0)
    assert "It had the highest logit." in worked(temperature=0).explain(0)


WHY_NOT = {
    "top_k": ({"top_k": 2}, 3, r"' cow' \(3\) was removed by top_k: it was number 4 of those left, and the first 2 "
              r"stay; its logit is 1\.609 below that of the last kept, ' cat' \(1\)\."),
    "top_p": ({"top_p": 0.6}, 2, r"' dog' \(2\) was removed by top_p: the mass before it was 0\.7, not below 0\.6 but "
              r"0\.1 more; its logit is 0\.4055 below that of the last kept, ' cat' \(1\)\."),
    "min_p": ({"min_p": 0.5}, 3,
              r"removed by min_p: it was 0\.15 times as likely as the most likely token, less than 0\.5;"),
    "typical": ({"typical_p": 0.3}, 0, r"removed by typical: the mass before it was 0\.5, not below 0\.3 but 0\.2 "
                r"more; its surprise is 0\.4309 nats away from the entropy, that of the last kept, "
                r"' cat' \(1\), 0\.1432\."),
    "banned": ({"banned": [3]}, 3, r"^' cow' \(3\) was removed by banned: it is banned\.$"),
    "above": ({}, 1, r"^' cat' \(1\) was never removed and had probability 0\.3, but u = 0\.20000000 fell below its "
              r"interval from 0\.40000000 to 0\.70000000, which is 0\.2 away\.$"),
    "greedy": ({"temperature": 0}, 1,
               r"was never removed, but its logit is 0\.2877 below that of '<bos>' \(0\), the highest"),
    "tie": ({"temperature": 0, "logit_bias": {1: float(WORKED[0] - WORKED[1])}}, 1,
            r"logit_bias moved the logit of ' cat' \(1\) from -1\.20397 to -0\.916291\. ' cat' \(1\) was never "
            r"removed, but its logit is the same, but its id is higher than that of"),
    "minus infinity": ({}, 5, r"could not come: the model gave it minus infinity\.$"),
    "chosen": ({}, 0, r"^'<bos>' \(0\) is what these settings choose\.$"),
    "moved first": ({"logit_bias": {3: -1.0}, "top_k": 2}, 3,
                    r"^logit_bias moved the logit of ' cow' \(3\) from -2\.81341 to "
                    r"-3\.81341\. ' cow' \(3\) was removed by top_k"),
}  # fmt: skip


@pytest.mark.parametrize("case", WHY_NOT)
def test_why_not(case):
    settings, token, pattern = WHY_NOT[case]
    text = worked(u=0.2, **settings).why_not(0, token)
    assert re.search(pattern, text), text
    assert "\n" not in text


def test_why_not_above_the_interval():
    assert "fell at or above the end of its interval from 0.00000000 to 0.40000000" in worked(u=0.5).why_not(0, 0)


def test_tokens_and_ids_that_are_not_there():
    record = worked()
    for bad in (6, -1):
        with pytest.raises(ValueError, match=rf"^token id {bad} is outside the vocabulary of 6"):
            record.why_not(0, bad)
    for bad in (1, -2):
        with pytest.raises(IndexError, match=rf"^token {bad} is not in the record: expected 0 to 0$"):
            record.explain(bad)
    assert record.explain(-1) == record.explain(0)
    assert record.text(99) == "token 99"


# ---- by hand


def test_a_record_of_another_engine_tells_where_it_chose_otherwise():
    record = record_logits([WORKED, WORKED], SamplingParams(temperature=1, top_k=2), uniforms=[0.1, 0.1], tokens=[0, 3])
    entry = record[1]
    assert (entry.token, entry.drawn, entry.interval, entry.logprob) == (3, 0, None, None)
    assert "another engine or other settings must have chosen token 3, which had been removed" in record.explain(1)
    assert record.why_not(1, 3).startswith("token 3 was removed by top_k")
    assert record.why_not(1, 0) == "token 0 is what these settings choose, but the record has token 3."
    kept = record_logits(WORKED, SamplingParams(temperature=1), uniforms=[0.1], tokens=[3])
    assert "must have chosen token 3, whose interval is [0.90000000, 0.96000000)" in kept.explain(0)


def test_logits_of_any_dtype_and_shape_and_tokens_that_feed_the_penalties():
    for dtype in (np.float16, np.float32, np.float64):
        record = record_logits(WORKED[:5].astype(dtype), SamplingParams(seed=4))
        assert record.logits[0].dtype == dtype
        assert record.params.seed == 4
        assert len(record) == 1
    assert record_logits([[3, 1, 2]], SamplingParams(temperature=0)).tokens == (0,)
    assert record_logits(WORKED, SamplingParams()).params.seed is not None
    same = np.array([2.0, 1.9, 0.0])
    record = record_logits([same] * 3, SamplingParams(temperature=0, presence_penalty=0.2))
    assert record.tokens == (0, 1, 0)  # after both have come, the first is ahead again
    assert record_logits([same] * 2, SamplingParams(temperature=0, presence_penalty=0.2), tokens=[2, 0])[1].steps[
        0
    ].ids == (2,)
    assert "Record(3 tokens after 0, V=3)" in repr(record)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"uniforms": [0.5]}, r"^1 uniforms were given for 2 rows of logits: expected one for each$"),
        ({"tokens": [0, 1, 2]}, r"^3 tokens were given for 2 rows of logits: expected one for each$"),
        ({"tokens": [0, 6]}, r"^token id 6 of tokens is outside the vocabulary of 6"),
        ({"logits": [[0.0, 1.0], [0.0]]}, r"^logits have rows of different lengths: expected \(V,\), or \(T, V\)"),
        ({"uniforms": [0.5, 1.0]}, r"^token 1: u is 1.0: expected a number in \[0, 1\)"),
        ({"prompt_tokens": [9]}, r"^token 0: token id 9 of prompt_tokens is outside the vocabulary of 6"),
        ({"logits": np.zeros((2, 0))}, r"^logits have shape \(2, 0\): expected \(V,\), or \(T, V\) for T tokens$"),
        (
            {"logits": np.zeros((2, 2, 2))},
            r"^logits have shape \(2, 2, 2\): expected \(V,\), or \(T, V\) for T tokens$",
        ),
        ({"logits": np.array([[0.0, 1.0], [np.nan, 0.0]])}, r"^token 1: logits hold NaN, first for token 0: "),
        ({"logits": np.full((1, 2), -np.inf)}, r"^token 0: logits are all minus infinity: "),
    ],
)
def test_bad_records_by_hand_are_one_clear_sentence(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        record_logits(**{"logits": [WORKED, WORKED], "params": SamplingParams()} | arguments)


LOWEST = np.finfo(np.float64).min


@pytest.mark.parametrize(
    ("logits", "settings", "step", "before"),
    [
        ([0, -1, LOWEST], {"temperature": 0.6}, "temperature", "-1.79769e+308"),
        ([0, -1, -1.5e308], {"temperature": 1, "logit_bias": {2: -1.7e308}}, "logit_bias", "-1.5e+308"),
        ([0, -1, -1.5e308], {"temperature": 1, "repetition_penalty": 2}, "repetition_penalty", "-1.5e+308"),
    ],
)
def test_a_step_that_drives_a_logit_beyond_float64_is_no_cut(logits, settings, step, before):
    record = record_logits(np.array(logits), SamplingParams(**settings), prompt_tokens=[2], uniforms=[0.1])
    want = f"token 2 was removed by {step}: that drove its logit from {before} to minus infinity."
    assert record.why_not(0, 2) == want
    assert ", 1 of them to minus infinity" in record.explain(0)


def test_a_greedy_token_of_another_engine_is_reported_in_a_sentence():
    record = record_logits(WORKED, SamplingParams(temperature=0), tokens=[1])
    assert "But token 0 had the highest logit: another engine or other settings must have chosen token 1." in (
        record.explain(0)
    )


def test_steps_that_move_nothing_say_so():
    record = record_logits(WORKED, SamplingParams(logit_bias={0: 0.0, 5: 2.0}, banned=[5]))
    assert "logit_bias moved no logit. banned removed none. " in record.explain(0)


def test_a_record_by_hand_settles_arrays(tmp_path):
    record = Record(
        params=SamplingParams(temperature=1, seed=3),
        prompt_tokens=np.array([0]),
        tokens=np.array([1, 0]),
        uniforms=np.array([0.5, 0.1], dtype=np.float32),
        logits=np.array([WORKED, WORKED]),
    )
    assert (record.prompt_tokens, record.tokens) == ((0,), (1, 0))
    assert {type(u) for u in record.uniforms} == {float}
    record.save(tmp_path / "run.jsonl")
    assert read_record(tmp_path / "run.jsonl").tokens == (1, 0)


@pytest.mark.parametrize("uniforms", [0.5, ["a"], "a", [None], [True]])
def test_uniforms_that_are_no_list_of_numbers_are_one_clear_sentence(uniforms):
    with pytest.raises(TypeError, match=r"^uniforms are .*: expected a list of numbers in \[0, 1\), one for each tok"):
        record_logits(WORKED, SamplingParams(), uniforms=uniforms)


def test_a_uniform_number_that_is_none_is_one_clear_sentence():
    with pytest.raises(TypeError, match=r"^u is 'x': expected a number in \[0, 1\)$"):
        decide(WORKED, SamplingParams(), u="x")


def test_given_uniforms_need_no_seed():
    assert record_logits(WORKED, SamplingParams(), uniforms=[0.5]).params.seed is None
    assert record_logits(WORKED, SamplingParams(seed=4), uniforms=[0.5]).params.seed == 4
