"""Each token is the decision on all before it; rows side by side stay apart; a seed gives the same again."""

from dataclasses import replace

import numpy as np
import pytest

from refgemma import generation
from refgemma.gemma import Gemma
from refgemma.generation import Row, generate
from refgemma.model import forward
from refgemma.numerics import FLOAT64
from refgemma.sampling import SamplingParams, decide, uniform
from tests.generation.runs import CONTEXT, SETTINGS, results
from tests.judge import FLOAT64_BOUND
from tests.models import widened

PROMPTS = ([2, 30, 31, 30, 77], [2], [2, *range(40, 58)])


@pytest.mark.parametrize("settings", [SETTINGS, {"temperature": 0, "max_tokens": 12}, {"seed": 3, "max_tokens": 12}])
def test_each_token_is_the_decision_on_the_logits_of_all_before_it(run, model, settings):
    """The whole text is read again at every step, without a cache: same token, and the same probabilities."""
    for prompt in PROMPTS:
        events = list(run(prompt, **settings))
        output = [event.token for event in events]
        seed = events[-1].result.seed
        logits = forward(widened(model.params), model.config, np.array([prompt + output]), numerics=FLOAT64)[0]
        scale = np.abs(logits).max()
        for t, event in enumerate(events):
            want = decide(logits[len(prompt) - 1 + t], SamplingParams(**settings), prompt, output[:t], uniform(seed, t))
            assert event.decision.token == event.token == want.token
            assert event.decision.u == want.u
            assert np.array_equal(event.decision.kept, want.kept)
            # A logit that is off by e, over a temperature of at least .6, moves a probability by e / .3 at most.
            assert np.abs(event.decision.probs - want.probs).max() <= FLOAT64_BOUND * scale / 0.3


def test_a_step_that_sees_its_own_token_is_rejected(run, model):
    """The test above can fail: logits of the position after are another distribution."""
    [prompt, *_] = PROMPTS
    events = list(run(prompt, **SETTINGS))
    tokens = np.array([prompt + [event.token for event in events]])
    logits = forward(widened(model.params), model.config, tokens, numerics=FLOAT64)[0]
    late = decide(logits[len(prompt)], SamplingParams(**SETTINGS), prompt, (), uniform(11, 0))
    assert np.abs(events[0].decision.probs - late.probs).max() > 1e-3


def test_record(run):
    [event] = run([2, 30], seed=1, max_tokens=1, top_k=5, top_p=0.5, repetition_penalty=1.1, record=True)
    assert [stage.name for stage in event.decision.stages] == ["repetition_penalty", "temperature", "top_k", "top_p"]
    assert event.decision.stages[0].ids.tolist() == [2, 30]
    [event] = run([2, 30], seed=1, max_tokens=1, top_k=5)
    assert event.decision.stages == ()


# ---- rows


def test_rows_come_out_as_they_would_alone(run):
    """Of any lengths, side by side; in float64, where no decision here is within 1e-12 of being another one."""
    together = results(run(*PROMPTS, **SETTINGS))
    alone = [results(run(prompt, **SETTINGS))[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(result.tokens) for result in alone}) == 3  # it can fail: no row is another one's
    assert results(run(*PROMPTS[::-1], **SETTINGS)) == alone[::-1]
    other = results(run(*PROMPTS, **SETTINGS | {"seed": 12}))
    assert all(ours.tokens != theirs.tokens for ours, theirs in zip(other, alone, strict=True))


def test_rows_that_end_early_leave_the_others_alone(run):
    alone = [results(run(prompt, **SETTINGS))[0].tokens for prompt in PROMPTS]

    def ends_at(stop):
        return [tokens.index(stop) + 1 if stop in tokens else len(tokens) for tokens in alone]

    stop = next(token for token in alone[0] if len(set(ends_at(token))) > 1)
    ends = ends_at(stop)
    assert min(ends) < max(ends)
    events = list(run(*PROMPTS, stop_ids=[stop], **SETTINGS))
    assert [result.tokens for result in results(events)] == [
        tokens[:end] for tokens, end in zip(alone, ends, strict=True)
    ]
    for row, end in enumerate(ends):
        of_row = [event for event in events if event.row == row]
        assert len(of_row) == end
        assert [event.result is not None for event in of_row] == [False] * (end - 1) + [True]


def test_a_prompt_near_the_end_of_the_context_beside_a_short_one(run):
    """The short row may go on for longer than the long one has room."""
    long = [2, *range(30, 30 + CONTEXT - 3)]
    events = results(run([2], long, seed=1, max_tokens=20))
    assert [len(result.tokens) for result in events] == [20, 2]
    assert events[0].tokens == results(run([2], seed=1, max_tokens=20))[0].tokens


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_prompts_read_in_chunks_come_out_the_same(run, monkeypatch, chunk):
    whole = results(run(*PROMPTS, **SETTINGS))
    monkeypatch.setattr(generation, "CHUNK", chunk)
    seen = []
    assert results(run(*PROMPTS, progress=lambda done, total: seen.append((done, total)), **SETTINGS)) == whole
    assert seen == sorted(seen)
    ends = [(min(done, 19), 19) for done in range(chunk, 19 + chunk, chunk)]
    assert set(ends) <= set(seen)
    assert seen[-1] == ends[-1]


def test_rows_beyond_the_vocabulary_are_no_tokens(run, model, small_tokenizer):
    """Some embedding tables have rows to spare; nothing may choose them, however likely the model finds them."""
    rng = np.random.default_rng(1)
    loud = 100 * rng.normal(size=(12, 40))
    wide = widened(model.params)
    table, head = (np.concatenate([wide[name], loud]) for name in ("embed", "head"))
    config = replace(model.config, vocab_size=512)
    params = wide | {"embed": table, "head": head}
    assert forward(params, config, np.array([[2]]), numerics=FLOAT64).argmax() >= 500
    settings = SamplingParams(temperature=1.0, seed=1, max_tokens=20)
    gemma = Gemma(config, params, small_tokenizer, FLOAT64, frozenset())
    events = list(generate(gemma, [Row(0, [2], settings, gemma)]))
    assert max(event.token for event in events) < 500
    assert events[0].decision.probs.shape == (500,)


# ---- seeds


def test_a_seed_is_reported_and_gives_the_same_again(run):
    first = results(run([2], [2], max_tokens=10))
    assert first[0].seed != first[1].seed  # drawn for each row: equal prompts do not give equal answers
    assert first[0].tokens != first[1].tokens
    for result in first:
        assert 0 <= result.seed < 2**32
        assert results(run([2], max_tokens=10, seed=result.seed)) == [result]
    assert results(run([2], max_tokens=10))[0].seed not in {result.seed for result in first}


def test_a_given_seed_is_used_by_every_row(run):
    for seed in (0, 2**64 - 1):
        both = results(run([2], [2], max_tokens=5, seed=seed))
        assert [result.seed for result in both] == [seed, seed]
        assert both[0].tokens == both[1].tokens
