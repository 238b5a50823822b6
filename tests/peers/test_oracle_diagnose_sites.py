"""Causes named with their places, from dumps of transformers with known bugs planted in some places of it only."""

from dataclasses import replace

import numpy as np
import pytest

from refgemma.oracle import diagnose
from refgemma.oracle.formula_models.formula import find
from refgemma.oracle.traces.trace import Trace
from tests.peers.test_oracle_diagnose import Batch
from tests.tiny_it import tiny_it

pytestmark = pytest.mark.peers

# Bug, places it is planted in, what is said of them.
IN_TWO_LAYERS = [
    ("C1", [1], "GELU by erf (C1), in layer 1 only"),
    ("C2", [0], "SiLU (C2), in layer 0 only"),
    ("C3", [0], "gate and up swapped (C3), in layer 0 only"),
    ("C3 weights", [1], "gate and up swapped (C3), in layer 1 only"),
    ("C3 reshaped", [0], "gate reshaped (C3 reshaped), in layer 0 only"),
    ("D7", [1], "rotary lanes paired as neighbours (D7), in layer 1 only"),
    ("E2", [1], "head width assumed to be D / N (E2), in layer 1 only"),
    ("E6", [0], "key heads read in turn (E6), in layer 0 only"),
    ("B1", ["final"], "norm gain w (B1), in the final norm only"),
    ("B1", ["1 attn"], "norm gain w (B1), in attn.norm of layer 1 only"),
    ("B2", [0], "norm gain 2 + w (B2), in layer 0 only"),
    ("B4", ["final"], "narrowed before the gain (B4), in the final norm only"),
    ("B5", ["final"], "a rounding profile: 1 + w in bfloat16 (B5), in the final norm only"),
    ("B6", ["1 mlp"], "mean square in bfloat16 (B6), in mlp.norm of layer 1 only"),
]
IN_SIX_LAYERS = [
    ("C1", [3], "GELU by erf (C1), in layer 3 only"),
    ("D7", [1, 3, 5], "rotary lanes paired as neighbours (D7), in layers 1, 3, 5 only"),
    ("C3", [5], "gate and up swapped (C3), in layer 5 only"),
    ("B1", [0, 1, 2, 4, "final"], "norm gain w (B1), in layers 0 to 2, 4 and the final norm only"),
    ("B6", [5], "mean square in bfloat16 (B6), in layer 5 only"),
]
IN_BFLOAT16 = [case for case in IN_TWO_LAYERS if case[0] in ("B1", "B4", "B5", "B6", "C1", "C2", "D7")]
PAIRS = [
    ({"C1": [0], "C2": [1]}, {("C1", "in layer 0 only"), ("C2", "in layer 1 only")}),
    ({"C1": [0, 1], "B1": ["final"]}, {("C1", ""), ("B1", "in the final norm only")}),
    ({"E6": [1], "D7": [0, 1]}, {("E6", "in layer 1 only"), ("D7", "")}),
    ({"B1": ["0 attn"], "B2": ["final"]}, {("B1", "in attn.norm of layer 0 only"), ("B2", "in the final norm only")}),
    ({"B6": ["final"], "C1": [0, 1]}, {("B6", "in the final norm only"), ("C1", "")}),
]


@pytest.fixture(scope="module")
def dump():
    """Function from a model and bugs with their places to transformers' trace."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install refgemma[peers]")
    pytest.importorskip("transformers", reason="needs transformers: pip install refgemma[peers]")
    from tests.peers.planted_somewhere import planted_somewhere

    def dumped(model, bugs, dtype="float32"):
        tensors = planted_somewhere(model, bugs, dtype=getattr(torch, dtype))
        return Trace(tensors, dict.fromkeys(tensors, dtype), model.tokens, model.positions, model.config)

    return dumped


@pytest.mark.parametrize(("bug", "places", "said"), IN_TWO_LAYERS)
def test_a_bug_in_one_place_is_named_with_it(bug, places, said, dump):
    found = diagnose(dump(find("reveal-gqa"), {bug: places}), "reveal-gqa")
    assert (found.verdict, found.tied) == (said, ())


@pytest.mark.parametrize(("bug", "places", "said"), IN_BFLOAT16)
def test_a_bug_in_one_place_of_a_narrow_run_is_named_with_it(bug, places, said, dump):
    found = diagnose(dump(find("reveal-gqa"), {bug: places}, "bfloat16"), "reveal-gqa")
    assert (found.verdict, found.tied) == (said, ())


@pytest.mark.parametrize(("bug", "places", "said"), IN_SIX_LAYERS)
def test_layers_are_named_and_what_hooks_do_not_show_is_bridged(bug, places, said, dump):
    gemma, T = tiny_it(), 10
    text = gemma.tokenizer.encode("The little cat sat on the mat, and then it said hello to the dog.", bos=True)[:T]
    model = Batch("tiny-it", gemma.config, gemma.params, np.array([text]), np.arange(T)[None])
    trace = dump(model, {bug: places})
    between = ("attn.q_rope", "attn.k_rope", "attn.scores", "attn.probs", "attn.mix", "attn.residual", "mlp.gated")
    kept = {name: value for name, value in trace.tensors.items() if not name.endswith(between)}
    for part in (trace, replace(trace, tensors=kept)):
        found = diagnose(part, gemma)
        assert (found.verdict, found.tied) == (said, ())


@pytest.mark.parametrize(("bugs", "named"), PAIRS)
def test_two_bugs_in_different_places_are_both_named(bugs, named, dump):
    found = diagnose(dump(find("reveal-gqa"), bugs), "reveal-gqa")
    assert set(zip(found.first.keys, found.first.places, strict=True)) == named
    assert not found.tied


@pytest.mark.parametrize("bug", ["C1", "C2", "D7", "E2", "E6", "B1", "B2", "B4", "B5", "B6"])
def test_a_bug_in_all_layers_has_no_place(bug, dump):
    places = [0, 1, "final"] if bug[0] == "B" else [0, 1]
    found = diagnose(dump(find("reveal-gqa"), {bug: places}), "reveal-gqa")
    assert (found.first.keys, found.first.places, found.tied) == ((bug,), ("",), ())


@pytest.mark.parametrize("bug", ["scaled", "scaled norm"])
def test_an_unknown_bug_in_one_layer_stays_unknown(bug, dump):
    found = diagnose(dump(find("reveal-gqa"), {bug: [1]}), "reveal-gqa")
    assert found.verdict == "no known bug explains it, alone or with another"
    assert len(found.honest.left) == 1
    found = diagnose(dump(find("reveal-gqa"), {bug: [0], "C1": [1]}), "reveal-gqa")
    assert found.verdict == "no known bug explains it, alone or with another"
    (left,) = set(found.honest.left) - {"layers.1.mlp.act"}
    assert f"GELU by erf (C1), in layer 1 only would leave {left}" in found.text()
