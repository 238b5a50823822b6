"""Free-running budgets: honest runs inside, mistakes outside, the same verdict every time."""

from dataclasses import replace

import numpy as np
import pytest

from refgemma.numerics import PROFILES
from refgemma.oracle.bounds import flow
from refgemma.oracle.judging.free_run import drift, judge_free
from refgemma.oracle.operations import split_name
from refgemma.oracle.traces.recording import trace
from tests.bfloat16 import narrow_params
from tests.models import random_model
from tests.oracle.gemmas import gemma_of
from tests.oracle.test_forced import model_of, run
from tests.truth import BUGS, truth_logits


def free(model, logits, arithmetic, **options):
    return judge_free(model.params, model.config, logits, model.tokens, model.positions, arithmetic, **options)


@pytest.mark.parametrize("profile", ["float32", "bf16-transformers", "bf16-deepmind"])
def test_our_own_runs_are_inside_the_budget(profile):
    for seed in range(2):
        model = model_of(seed)
        theirs = run(model, profile)
        found = free(model, theirs.tensors["logits"], profile)
        assert found.name == "logits"
        assert found.grade == "inside rounding"
        # The budget is no more than some tens of what rounding really does. Measured on 200 models of transformers:
        # 0.09 to 0.6.
        assert 0.03 < found.likely <= 1
        assert found.ratio == pytest.approx(found.error / found.bound)
        last = 16 - model.real[:, ::-1].argmax(axis=1)
        alone = free(model, theirs.tensors["logits"][np.arange(len(last)), last], profile)
        assert alone.likely <= found.likely
        assert alone.where[1] == last[alone.where[0]]


@pytest.mark.parametrize("bug", sorted(set(BUGS) - {"A5", "D2", "D9", "B9"}))
def test_mistakes_are_outside_the_float32_budget(bug):
    """Final logits alone, from the truth written by hand with the mistake in it."""
    model = model_of(2)  # 1 < K < N
    wrong = truth_logits(model.params, model.config, model.tokens, model.positions, bugs={bug})
    found = free(model, wrong, "float32", seeds=range(3))
    assert found.grade == "wrong", (bug, found.ratio)


def test_the_truth_is_inside_every_budget():
    model = model_of(2)
    truth = truth_logits(model.params, model.config, model.tokens, model.positions)
    assert free(model, truth, "float32", seeds=range(3)).likely < 1e-6


def test_verdicts_are_repeatable_and_the_same_for_chunks(monkeypatch):
    model = model_of(1)
    logits = run(model).tensors["logits"]
    assert free(model, logits, "float32") == free(model, logits, "float32")
    whole = free(model, logits, "float32")
    monkeypatch.setattr(flow, "_CHUNK", 6)
    pieces = free(model, logits, "float32")  # other noise, the same size
    assert 0.3 < pieces.likely / whole.likely < 3


def test_the_last_position_in_chunks(monkeypatch):
    model = model_of(0)
    last = 16 - model.real[:, ::-1].argmax(axis=1)
    logits = run(model).tensors["logits"][np.arange(len(last)), last]
    for chunk in (512, 16, 5):
        monkeypatch.setattr(flow, "_CHUNK", chunk)
        found = free(model, logits, "float32")
        assert found.grade == "inside rounding"
        assert found.where[1] == last[found.where[0]]
        assert free(model, logits * np.float32(1.01), "float32").grade == "wrong"


def test_the_stream_drifts_inside_its_budget_until_something_is_wrong():
    model = model_of(2)
    theirs = run(model)
    names = [f"layers.{i}.{kind}" for i in range(model.config.num_layers) for kind in ("attn.residual", "out")]
    findings = drift(model.params, model.config, theirs, "float32")
    assert [f.name for f in findings] == ["embed", *names, "final_norm", "logits"]
    assert all(f.grade == "inside rounding" for f in findings)
    wrong = drift(
        model.params,
        model.config,
        run(model, tap=lambda name, x: x * np.float32(1.001) if name == "layers.0.mlp.down" else x),
        "float32",
    )
    got = {f.name: f.grade for f in wrong}
    assert got["layers.0.attn.residual"] == "inside rounding"
    assert {grade for name, grade in got.items() if name not in ("embed", "layers.0.attn.residual")} == {"wrong"}
    every = drift(model.params, model.config, theirs, "float32", names=["*"], seeds=(0, 1, 2))
    kinds = {split_name(f.name)[1] for f in every}
    assert {"attn.q_rope", "mlp.act"} <= kinds
    assert not {"attn.scores", "attn.probs"} & kinds


def test_a_changed_reference_explains_a_changed_run():
    model = model_of(0)
    wrong = run(model, tap=lambda name, x: x * np.float32(0.5) if name == "embed" else x).tensors["logits"]
    assert not free(model, wrong, "float32").ok
    assert free(model, wrong, "float32", tap=lambda name, x: x * 0.5 if name == "embed" else x).ok


def test_numbers_that_are_not_finite_and_shapes_that_do_not_fit():
    model = model_of(0)
    logits = run(model).tensors["logits"].copy()
    logits[tuple(np.argwhere(model.real)[-1])] = np.inf
    found = free(model, logits, "float32")
    assert found.grade == "wrong"
    assert "not finite" in found.pattern
    with pytest.raises(ValueError, match=r"^the candidate's logits have shape \(3,\): expected \("):
        free(model, np.zeros(3), "float32")


def test_bfloat16_budgets_are_for_the_weights_of_a_bfloat16_engine():
    model = model_of(1)
    narrow = narrow_params(model.params)
    logits = run(model, "bf16-transformers").tensors["logits"]
    of_narrow = judge_free(narrow, model.config, logits, model.tokens, model.positions, PROFILES["bf16-transformers"])
    assert free(model, logits, "bf16-transformers").ratio == of_narrow.ratio


def test_what_stands_at_padding_is_not_judged():
    model = random_model(2, num_tokens=9)
    positions = np.tile(np.arange(9), (len(model.tokens), 1))
    positions[0] = [-1, -1, *range(7)]
    whole = trace(gemma_of(model), model.tokens, positions=positions)
    for junk in (1e9, np.nan):
        tensors = {name: value.copy() for name, value in whole.tensors.items()}
        tensors["layers.0.out"][0, :2] = junk
        (found,) = drift(model.params, model.config, replace(whole, tensors=tensors), "float32", names=["layers.0.out"])
        assert found.grade == "inside rounding"
        tensors["layers.0.out"][0, 2] = junk
        (found,) = drift(model.params, model.config, replace(whole, tensors=tensors), "float32", names=["layers.0.out"])
        assert found.grade == "wrong"
