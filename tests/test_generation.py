"""Generation: what ends a text and what of it comes out when, rows that stay apart, seeds, prompts read before."""

from dataclasses import replace

import numpy as np
import pytest

from refgemma import generation
from refgemma.generation import PrefixCache, Usage, generate, split_at_stop
from refgemma.model import forward
from refgemma.numerics import FLOAT32, FLOAT64
from refgemma.sampling import SamplingParams, decide, uniform
from tests.judge import FLOAT64_BOUND
from tests.models import widened
from tests.talker import talker

CONTEXT = 64


@pytest.fixture(scope="module")
def model():
    return talker(max_positions=CONTEXT)


@pytest.fixture(scope="module")
def run(model, small_tokenizer):
    """Function from prompts and settings to events."""
    params = widened(model.params)

    def run(*prompts, stop_ids=(), numerics=FLOAT64, params=params, tokenizer=small_tokenizer, **settings):
        options = {name: settings.pop(name) for name in ("prefix", "progress", "record") if name in settings}
        return generate(
            params,
            model.config,
            tokenizer,
            prompts,
            SamplingParams(**settings),
            stop_ids=frozenset(stop_ids),
            numerics=numerics,
            **options,
        )

    return run


def results(events):
    """What each row came to, in the order of the prompts."""
    done = {event.row: event.result for event in events if event.result is not None}
    return [done[row] for row in sorted(done)]


@pytest.fixture
def play(monkeypatch, run, small_tokenizer):
    """Function that runs a model which writes given outputs, one a row, and pads when it is through with one."""

    def play(*outputs, prompts=None, **settings):
        prompts = prompts or [[small_tokenizer.bos_id]] * len(outputs)

        def scripted(params, config, tokens, *, positions, cache, logits, numerics):
            cache.extend(positions)
            scores = np.zeros((len(outputs), config.vocab_size))
            for row, output in enumerate(outputs):
                index = positions[row].max() + 1 - len(prompts[row])
                if 0 <= index < len(output):
                    scores[row, output[index]] = 1
            return scores

        monkeypatch.setattr(generation, "forward", scripted)
        return list(run(*prompts, temperature=0, **settings))

    return play


# ---- what ends a text


STOPS = {  # text, stop texts, what comes out
    "inside a token": (" hello password user", ["ssw"], " hello pa"),
    "over a token border": (" hello world user", ["o w"], " hell"),
    "over three tokens": (" hello in it of user", ["o in it o"], " hell"),
    "a whole token": (" hello world user", [" world"], " hello"),
    "the very beginning": (" hello world", [" hello"], ""),
    "the very end": (" hello world", ["rld"], " hello wo"),
    "the first of two": (" hello world user", ["user", "world"], " hello "),
    "the first of one text": (" the the the", ["the"], " "),
    "one that begins another": (" hello world", ["wor", "world"], " hello "),
    "one that another begins": (" hello world", ["world", "wor"], " hello "),
    "one inside another": (" hello world", ["hello world", "world"], " "),
    "one that begins and does not come true": (" hello world user", ["worm", "orb"], " hello world user"),
    "one that begins twice": (" hehehello", ["hehell"], " he"),
    "one that begins at the end": (" hello world", ["world is"], " hello world"),
    "a line end": ("hello\n\nworld", ["\n\n"], "hello"),
    "bytes of one character": ("hello \N{SNOWMAN} world", ["\N{SNOWMAN} w"], "hello "),
    "a character that begins like the stop's": ("hello \N{COMET} world", ["\N{SNOWMAN}"], "hello \N{COMET} world"),
    "none": (" hello world", [], " hello world"),
}


@pytest.mark.parametrize("split", ["tokens", "characters"])
@pytest.mark.parametrize("case", STOPS)
def test_stop_texts(case, split, play, small_tokenizer):
    text, stops, want = STOPS[case]
    runs = [text] if split == "tokens" else text
    output = [i for run in runs for i in small_tokenizer.encode(run)]
    events = play([*output, small_tokenizer.eos_id], stop_ids=[small_tokenizer.eos_id], stop=stops)
    result = events[-1].result
    assert result.text == want
    assert result.finish_reason == "stop"
    assert "".join(event.text for event in events) == want
    assert [event.token for event in events] == result.tokens == [*output, small_tokenizer.eos_id][: len(events)]
    if want == text:
        assert result.tokens[-1] == small_tokenizer.eos_id
    else:
        # It stops at the first token that completes a stop text, and not before.
        assert len(result.tokens) == next(
            n for n in range(len(output) + 1) if any(stop in small_tokenizer.decode(output[:n]) for stop in stops)
        )


def test_the_cases_of_stop_texts_are_what_they_say(small_tokenizer):
    assert len(small_tokenizer.encode(" password")) == 1
    assert len(small_tokenizer.encode(" hello world")) == 2
    assert len(small_tokenizer.encode("\N{SNOWMAN}")) == 3
    assert small_tokenizer.encode("\N{SNOWMAN}")[:1] == small_tokenizer.encode("\N{COMET}")[:1]


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("abc", [], ("abc", "", False)),
        ("abc", ["bcd"], ("a", "bc", False)),
        ("abc", ["cab", "bcd"], ("a", "bc", False)),
        ("abab", ["ababc"], ("", "abab", False)),
        ("aab", ["abab"], ("a", "ab", False)),
        ("abcd", ["cd", "b"], ("a", "", True)),
        ("", ["a"], ("", "", False)),
        ("aaaa", ["aaaaa"], ("", "aaaa", False)),
        ("xaaaa", ["aa"], ("x", "", True)),
    ],
)
def test_split_at_stop(text, stops, want):
    assert split_at_stop(text, stops) == want


def test_text_is_released_as_soon_as_it_is_certain(play, small_tokenizer):
    output = small_tokenizer.encode(" hello world the user")
    texts = [event.text for event in play(output, max_tokens=4, stop=["world is"])]
    assert texts == [" hello", " ", "world the", " user"]
    texts = [event.text for event in play(output, max_tokens=2, stop=["world is"])]
    assert texts == [" hello", " world"]  # at the end nothing is held back


def test_half_a_character_is_not_released(play, small_tokenizer):
    snowman = small_tokenizer.encode("\N{SNOWMAN}")
    assert [event.text for event in play(snowman, max_tokens=3)] == ["", "", "\N{SNOWMAN}"]
    assert [event.text for event in play(snowman, max_tokens=2)] == ["", "\ufffd\ufffd"]  # one a byte, as `decode` does
    cut = play([*snowman[:2], small_tokenizer.eos_id], stop_ids=[small_tokenizer.eos_id])
    assert [event.text for event in cut] == ["", "", "\ufffd\ufffd"]


def test_a_stop_text_in_the_last_token_allowed_is_a_stop(play, small_tokenizer):
    output = small_tokenizer.encode(" hello world user")
    result = play(output, max_tokens=2, stop="world")[-1].result
    assert (result.text, result.finish_reason) == (" hello ", "stop")


def test_stop_tokens_end_a_row_and_are_no_text(play, small_tokenizer):
    hello = small_tokenizer.encode(" hello")
    for stop in (small_tokenizer.eos_id, small_tokenizer.end_of_turn_id, hello[0]):
        result = play([*hello * 2, stop, *hello], stop_ids=[stop])[-1].result
        ended = 1 if stop == hello[0] else 3
        assert result.tokens == [*hello * 2, stop][:ended]
        assert result.text == " hello" * (ended - 1)
        assert result.finish_reason == "stop"
        assert result.usage == Usage(prompt_tokens=1, completion_tokens=ended)
    # A marker that is no stop token is text, a control is not.
    output = [small_tokenizer.end_of_turn_id, small_tokenizer.bos_id, *hello]
    assert play(output, max_tokens=3)[-1].result.text == "<end_of_turn> hello"


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_max_tokens(play, small_tokenizer, max_tokens):
    result = play(small_tokenizer.encode(" hello") * 9, max_tokens=max_tokens)[-1].result
    assert result.finish_reason == "length"
    assert result.text == " hello" * max_tokens
    assert result.usage == Usage(prompt_tokens=1, completion_tokens=max_tokens)
    assert result.usage.total_tokens == 1 + max_tokens


@pytest.mark.parametrize("room", [1, 2, 10])
def test_the_end_of_the_context(run, room):
    [result] = results(run([2] * (CONTEXT - room), seed=1, max_tokens=1000))
    assert result.finish_reason == "length"
    assert len(result.tokens) == room


def test_a_prompt_that_leaves_no_room_is_one_clear_sentence(run):
    for length in (CONTEXT, CONTEXT + 5):
        with pytest.raises(
            ValueError, match=rf"^the prompt has {length} tokens, .* context of {CONTEXT} .*: shorten it$"
        ):
            list(run([2], [2] * length))


def test_an_empty_prompt_is_one_clear_sentence(run):
    with pytest.raises(ValueError, match=r"^the prompt has no tokens: expected at least <bos>$"):
        list(run([2], []))
    assert list(run()) == []


def test_tokens_outside_the_vocabulary_are_one_clear_sentence(run):
    with pytest.raises(ValueError, match=r"^token id 500 is outside the vocabulary of 500"):
        list(run([2, 500]))


# ---- every step


SETTINGS = {
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.95,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.2,
    "seed": 11,
    "max_tokens": 12,
}
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
    assert seen == [(min(done, 19), 19) for done in range(chunk, 19 + chunk, chunk)]


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
    events = list(generate(params, config, small_tokenizer, [[2]], settings, stop_ids=frozenset(), numerics=FLOAT64))
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


# ---- prompts that begin like the last one


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
    list(run(prompt, prefix=prefix, **SETTINGS))
    other = widened(talker(5, max_positions=CONTEXT).params)
    for changed in ({"params": other}, {"numerics": FLOAT32, "params": model.params}):
        want = results(run(prompt, **changed, **SETTINGS))
        fed.clear()
        assert results(run(prompt, prefix=prefix, **changed, **SETTINGS)) == want
        assert fed[0] == 4


def test_a_prefix_cache_serves_one_prompt(run):
    with pytest.raises(ValueError, match=r"^a prefix cache serves one prompt, 2 were given$"):
        list(run([2], [2], prefix=PrefixCache()))
