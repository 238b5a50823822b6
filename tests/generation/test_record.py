"""The record of a run: it holds what was decided, says why, and replays."""

import numpy as np
import pytest

from refgemma.numerics import FLOAT32, to_host
from refgemma.sampling import read_record, uniform
from tests.generation.runs import SETTINGS, results

PROMPTS = [[2, 30, 31], [2, 40]]


@pytest.fixture
def events(run, model):
    return list(run(*PROMPTS, record=True, numerics=FLOAT32, params=model.params, **SETTINGS))


def test_a_record_holds_every_decision_of_its_row(events, small_tokenizer):
    for row, result in enumerate(results(events)):
        record, own = result.record, [event for event in events if event.row == row]
        assert list(record.tokens) == result.tokens == [event.token for event in own]
        assert list(record.prompt_tokens) == PROMPTS[row]
        assert record.params.seed == result.seed == SETTINGS["seed"]
        assert record.uniforms == tuple(uniform(result.seed, t) for t in range(len(own)))
        assert record.vocab_size == small_tokenizer.vocab_size == 500
        assert record.piece(30) == small_tokenizer.piece(30)
        for t, event in enumerate(own):
            assert record.logits[t].dtype == np.float32
            decision = record.decision(t)
            assert decision.token == record[t].drawn == event.token
            assert np.array_equal(decision.probs, event.decision.probs)
            assert record[t].kept == len(event.decision.kept)
    assert not np.array_equal(results(events)[0].record.logits[0], results(events)[1].record.logits[0])


def test_a_record_goes_to_disk_and_replays(events, tmp_path):
    record = results(events)[0].record
    record.save(tmp_path / "run.jsonl")
    again = read_record(tmp_path / "run.jsonl")
    assert again.replay().tokens == record.tokens
    other = again.replay(seed=12)
    assert other.first_difference is not None
    assert other.tokens[:-1] == record.tokens[: len(other.tokens) - 1]
    assert other.tokens[-1] != record.tokens[len(other.tokens) - 1]


def test_logits_on_record_are_not_those_of_a_later_step(run, model, monkeypatch):
    """A model may hand out the same array at every step, and fill it anew."""
    from refgemma import generation

    shared = np.zeros((1, 500), np.float32)
    forward = generation.forward

    def reusing(*args, **kwargs):
        shared[:] = to_host(forward(*args, **kwargs))[:, :500]
        return shared

    monkeypatch.setattr(generation, "forward", reusing)
    [result] = results(run([2], record=True, numerics=FLOAT32, params=model.params, **SETTINGS))
    rows = [row.tobytes() for row in result.record.logits]
    assert len(set(rows)) == len(rows) > 1
    assert result.record.replay().first_difference is None


def test_no_record_unless_asked(run):
    [result] = results(run([2], seed=1, max_tokens=2))
    assert result.record is None
    [recorded] = results(run([2], seed=1, max_tokens=2, record=True))
    assert recorded == result  # what it says is the same
    assert "Record" not in repr(recorded)
