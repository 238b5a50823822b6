"""Known bugs planted in transformers: called wrong at the operation that holds them, and nowhere before.

The bugs are torch code of `tests.peers.planted`; the formula models show them all. Only what a catalogue lists as
"visible in float32" or "bfloat16 runs only" can be seen; D3 is rounding, which the bounds contain.
"""

import numpy as np
import pytest

from refgemma.oracle.formula_models import formula
from refgemma.oracle.judging.forced import judge_forced
from refgemma.oracle.judging.grades import first_wrong
from refgemma.oracle.operations import split_name
from refgemma.oracle.traces.trace import Trace

pytestmark = pytest.mark.peers

NORMS = {"attn.norm", "mlp.norm", "final_norm"}
TURNS = {"attn.q_rope", "attn.k_rope"}

# bug: (dtype, the operations that hold it, what the pattern of the first one says or "")
HELD = [
    ("A1", "float32", {"embed"}, "constant factor"),
    ("A2", "float32", {"embed"}, "constant factor"),
    ("A2", "bfloat16", {"embed"}, "constant factor"),
    ("A3", "float32", {"logits"}, "constant factor"),
    ("A4", "float32", {"embed"}, "constant factor"),
    ("A5", "float32", {"embed"}, ""),
    ("B1", "float32", NORMS, "one factor for each channel"),
    ("B2", "float32", NORMS, "one factor for each channel"),
    ("B4", "bfloat16", NORMS, ""),
    ("B5", "float32", NORMS, "one factor for each channel"),
    ("B5", "bfloat16", NORMS, ""),
    ("B6", "float32", NORMS, "one factor for each token"),
    ("B6", "bfloat16", NORMS, ""),
    ("B8", "float32", {"attn.norm", "attn.residual", "mlp.norm", "out"}, "equal to embed"),
    ("B8 gemma2", "float32", {"attn.residual", "mlp.norm"}, ""),
    ("B9", "float32", NORMS, "factor"),
    ("B9 1e-5", "float32", NORMS, "factor"),
    ("C1", "float32", {"mlp.act"}, ""),
    ("C2", "float32", {"mlp.act"}, ""),
    ("C3", "float32", {"mlp.act", "mlp.gated"}, ""),
    ("C3 weights", "float32", {"mlp.gate", "mlp.up"}, ""),
    ("C3 reshaped", "float32", {"mlp.gate"}, ""),
    ("D1", "float32", TURNS, ""),
    ("D1", "bfloat16", TURNS, ""),
    ("D1 frequencies", "float32", TURNS, ""),
    ("D1 frequencies", "bfloat16", TURNS, ""),
    ("D1 table", "float32", TURNS, ""),
    ("D2", "float32", TURNS, ""),
    ("D7", "float32", TURNS, ""),
    ("D9", "float32", TURNS, "only rows that hold padding, only the last token"),
    ("D9 restarted", "float32", TURNS, "only the last token, equal to attn.q"),
    ("E2", "float32", {"attn.scores"}, "constant factor"),
    ("E6", "float32", {"attn.scores", "attn.mix"}, "heads"),
    ("G1", "bfloat16", {"attn.scores"}, ""),
]


@pytest.fixture(scope="module")
def planted():
    """The bugs."""
    pytest.importorskip("torch", reason="needs torch: pip install refgemma[peers]")
    pytest.importorskip("transformers", reason="needs transformers: pip install refgemma[peers]")
    from tests.peers import planted

    return planted


def judged(planted, model, bugs, dtype):
    import torch

    tensors = planted.planted_tensors(model, bugs, dtype=getattr(torch, dtype))
    theirs = Trace(tensors, dict.fromkeys(tensors, dtype), model.tokens, model.positions, model.config)
    return judge_forced(model.params, model.config, theirs, dtype)


def test_every_bug_that_a_run_can_show_is_here(planted):
    there = {
        (bug, dtype)
        for bug, (_, shown) in planted.BUGS.items()
        for dtype in ("float32", "bfloat16")
        if shown in (dtype, "both") and not bug.startswith(("H1", "D3"))  # tokens; rounding
    }
    assert {(bug, dtype) for bug, dtype, *_ in HELD} == there


@pytest.mark.parametrize(("bug", "dtype", "held", "words"), HELD, ids=[f"{bug} {dtype}" for bug, dtype, *_ in HELD])
def test_a_bug_is_wrong_at_the_operation_that_holds_it(planted, bug, dtype, held, words):
    shown = []
    for model in formula.MODELS:
        findings = judged(planted, model, [bug], dtype)
        wrong = {split_name(finding.name)[1] for finding in findings if finding.grade == "wrong"}
        assert wrong <= held, model.name  # and nothing else, before or after
        found = first_wrong(findings)
        if found is not None:
            shown.append((model.name, found))
    # Some models cannot show some bugs: no padding, 1 = K, positions that bfloat16 can count.
    assert shown
    for name, found in shown:
        print(f"\n{bug}, {dtype}, {name}: {found.name}, {found.ratio:.3g} times the bound, {found.pattern or '-'}")
    first = shown[0][1]
    assert split_name(first.name)[1] in held
    assert words in first.pattern


@pytest.mark.parametrize("bug", ["D3", "D3 divided"])
def test_either_way_to_form_angles_in_float32_is_rounding(planted, bug):
    """Even at position 131071, where the two differ by 0.01."""
    for model in formula.MODELS:
        findings = judged(planted, model, [bug], "float32")
        assert all(finding.grade == "inside rounding" for finding in findings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_bug_is_no_finding(planted, dtype):
    for model in formula.MODELS:
        assert all(finding.grade == "inside rounding" for finding in judged(planted, model, (), dtype))


@pytest.mark.parametrize("seed", range(3))
def test_two_bugs_are_seen_both(planted, seed):
    """Forced: the second is not hidden behind the first."""
    rng = np.random.default_rng(seed)
    model = formula.MODELS[0]
    pool = {
        bug: held for bug, dtype, held, _ in HELD if dtype == "float32" and bug in ("A1", "B1", "C1", "D7", "E2", "E6")
    }
    for one, other in [rng.choice(list(pool), size=2, replace=False) for _ in range(4)]:
        wrong = {split_name(f.name)[1] for f in judged(planted, model, [one, other], "float32") if f.grade == "wrong"}
        assert wrong & pool[one]
        assert wrong & pool[other]
        assert wrong <= pool[one] | pool[other]
