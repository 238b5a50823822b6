"""Prompts that begin like the last one: the same output, for less work, whatever became of the run before."""

import numpy as np
import pytest

from refgemma import generation
from refgemma.cache import PrefixCache
from refgemma.model import forward
from refgemma.numerics import FLOAT32, Numerics
from tests.generation.runs import CONTEXT, SETTINGS, results
from tests.models import widened
from tests.talker import talker


@pytest.fixture
def fed(monkeypatch):
    """Tokens fed in each call of the model."""
    calls = []

    def counting(params, config, tokens, **arguments):
        calls.append(tokens.shape[1])
        return forward(params, config, tokens, **arguments)

    monkeypatch.setattr(generation, "forward", counting)
    return calls


def test_a_prefix_cache_changes_nothing_but_the_work(run, fed):
    """A chat: every prompt begins with all that went before."""
    prefix, prompt = PrefixCache(), [2, 30, 31]
    for turn in range(3):
        want = results(run(prompt, **SETTINGS))
        fed.clear()
        assert results(run(prompt, prefix=prefix, **SETTINGS)) == want
        # At first the whole prompt; later what is new in it, three tokens, and what came last, which was never fed.
        assert fed == [3 if turn == 0 else 4, *[1] * 11]
        assert prefix.tokens == prompt + want[0].tokens[:-1]
        prompt = [*prompt, *want[0].tokens, 60 + turn, 61, 62]


@pytest.mark.parametrize(
    ("second", "work"),
    [
        ([2, 30, 31, 32, 33], 1),  # the same again: its last token is fed, for its logits
        ([2, 30, 31], 1),  # a beginning of it
        ([2, 30, 99, 32, 33], 3),  # another middle
        ([5, 30, 31, 32, 33], 5),  # another beginning
        ([2], 1),
    ],
)
def test_a_prefix_cache_with_a_prompt_that_diverges(run, fed, second, work):
    prefix = PrefixCache()
    list(run([2, 30, 31, 32, 33], prefix=prefix, **SETTINGS))
    want = results(run(second, **SETTINGS))
    fed.clear()
    assert results(run(second, prefix=prefix, **SETTINGS)) == want
    assert fed[0] == work


def test_a_prefix_cache_after_a_run_that_was_closed(run, fed):
    prefix, prompt = PrefixCache(), [2, 30, 31, 32]
    want = [event.token for event in run(prompt, **SETTINGS)]
    for taken in (1, 3):
        events = run(prompt, prefix=prefix, **SETTINGS)
        assert [next(events).token for _ in range(taken)] == want[:taken]
        events.close()
        assert prefix.tokens == prompt + want[: taken - 1]
    longer = [*prompt, *want[:2], 60]
    wanted = results(run(longer, **SETTINGS))
    fed.clear()
    assert results(run(longer, prefix=prefix, **SETTINGS)) == wanted
    assert fed[0] == 1


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_a_prefix_cache_after_an_interrupt(run, monkeypatch, call):
    """Ctrl-C in the middle of a forward pass: its tokens are in some layers' keys and not in others'."""
    monkeypatch.setattr(generation, "CHUNK", 3)
    prefix, prompt = PrefixCache(), [2, 30, 31, 32, 33, 34]
    calls = 0

    def interrupt(name, value):
        if calls == call and name == "layers.1.attn.q":
            raise KeyboardInterrupt
        return value

    def interrupted(*arguments, **named):
        nonlocal calls
        calls += 1
        return forward(*arguments, tap=interrupt, **named)

    monkeypatch.setattr(generation, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(run(prompt, prefix=prefix, **SETTINGS))
    monkeypatch.setattr(generation, "forward", forward)
    want = results(run(prompt, **SETTINGS))
    assert prefix.tokens == (prompt + want[0].tokens)[: min(3 * (call - 1), 6) + max(call - 3, 0)]
    assert results(run(prompt, prefix=prefix, **SETTINGS)) == want


def test_a_prefix_cache_is_not_carried_over_to_other_weights_or_arithmetic(run, model, fed):
    """The keys of one model mean nothing to another, such as the same one with an adapter."""
    prefix, prompt = PrefixCache(), [2, 30, 31, 32]
    other = widened(talker(5, max_positions=CONTEXT).params)
    rounded = Numerics("rounded", np.dtype(np.float64), {"linear": "float32"})
    for changed in ({"params": other}, {"numerics": rounded}, {"numerics": FLOAT32, "params": model.params}):
        list(run(prompt, prefix=prefix, **SETTINGS))
        want = results(run(prompt, **changed, **SETTINGS))
        fed.clear()
        assert results(run(prompt, prefix=prefix, **changed, **SETTINGS)) == want
        assert fed[0] == 4


def test_what_several_prompts_begin_with_is_read_once(run, fed):
    prefix, beginning = PrefixCache(), [2, 30, 31, 32, 33, 34]
    prompts = [[*beginning, 40], [*beginning, 41, 42, 43], [*beginning, 44]]
    want = results(run(*prompts, **SETTINGS))
    fed.clear()
    assert results(run(*prompts, prefix=prefix, **SETTINGS)) == want
    assert fed == [6, 3, *[1] * (len(fed) - 2)]  # for all rows at once: the beginning, then the longest rest
    assert prefix.tokens == beginning
    fed.clear()
    assert results(run(*prompts[:2], prefix=prefix, **SETTINGS)) == want[:2]
    assert fed[0] == 3
    fed.clear()
    assert results(run(prompts[1], prefix=prefix, **SETTINGS)) == want[1:2]
    assert fed[0] == 3


def test_prompts_with_no_beginning_in_common(run):
    prompts = [[2, 30], [3, 31, 32], [2]]
    want = results(run(*prompts, **SETTINGS))
    assert results(run(*prompts, prefix=PrefixCache(), **SETTINGS)) == want


def test_runs_that_overlap_disturb_neither_each_other_nor_what_they_share(run):
    """Each extends a copy of its own; a run that wrote into shared slots would change what the other reads."""
    prefix, prompts = PrefixCache(), [[2, 30, 31, 32], [2, 30, 40], [2, 30, 31, 50, 51]]
    want = [results(run(prompt, **SETTINGS)) for prompt in prompts]
    runs = [iter(run(prompt, prefix=prefix, **SETTINGS)) for prompt in prompts]
    events = [[] for _ in runs]
    for _ in range(len(want[0][0].tokens)):
        for got, events_of_run in zip(events, runs, strict=True):
            got.extend(event for event in [next(events_of_run, None)] if event is not None)
    assert [results(got) for got in events] == want


def test_a_prompt_without_room_is_refused_before_the_first_token_is_asked_for(run):
    with pytest.raises(ValueError, match=r"too many for a context of"):
        run([2] * CONTEXT)
