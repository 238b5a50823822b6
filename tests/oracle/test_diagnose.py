"""Causes named from dumps of the truth written by hand, with known bugs in it; bugs in transformers are in tests/peers.

The truth computes in float64, so it is judged as float64: its bounds are 1e-9 of those of float32, and nothing hides.
"""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from refgemma.numerics import FLOAT32, PROFILES
from refgemma.oracle import diagnose
from refgemma.oracle.bugs.catalogue import find as bug_of
from refgemma.oracle.bugs.port import Setup, run
from refgemma.oracle.diagnosis.result import Cause, Diagnosis
from refgemma.oracle.formula_models.formula import MODELS, find
from refgemma.oracle.traces.trace import Trace
from tests.models import random_model
from tests.oracle.gemmas import gemma_of
from tests.oracle.publish import trace_of
from tests.oracle.test_stored import NARROW, SEEN
from tests.tiny_it import tiny_it
from tests.truth import BUGS, truth_logits, truth_row

FLOAT32_BUGS = sorted(set(BUGS) - {"A5"})


def dump(model, bugs=()):
    """Every named tensor of the truth with bugs in it, put together from its rows."""
    B, T = model.tokens.shape
    tensors = {}
    for b, real in enumerate(model.positions >= 0):
        places = model.positions[b, real].copy()
        if "D9" in bugs:
            places[-1] += np.count_nonzero(~real)
        for name, value in truth_row(model.params, model.config, model.tokens[b, real], places, bugs=set(bugs)).items():
            square = name.endswith(("scores", "probs"))
            shape = (value.shape[0], T, T) if square else (T, *value.shape[1:])
            whole = tensors.setdefault(name, np.zeros((B, *shape)))
            if square:
                seen = np.tril(np.ones((real.sum(), real.sum()), bool))
                whole[b][:, np.outer(real, real)] = np.where(seen, value, 0).reshape(len(value), -1)
            else:
                whole[b, real] = value
    return Trace(tensors, dict.fromkeys(tensors, "float64"), model.tokens, model.positions, model.config)


def only(trace, *kinds):
    """The same dump with fewer tensors."""
    kept = {name: value for name, value in trace.tensors.items() if name.endswith(kinds)}
    return replace(trace, tensors=kept)


@pytest.mark.parametrize("name", ["reveal-gqa", "reveal-mqa"])
def test_nothing_is_found_in_an_honest_dump(name):
    trace = dump(find(name))
    for part in (trace, only(trace, "logits"), only(trace, "out"), only(trace, "attn.q_rope", "mlp.act")):
        found = diagnose(part, name)
        assert found.verdict == "no known bug needed: all of it is inside rounding"
        assert (found.ok, found.first, found.causes, found.closer) == (True, None, (), ())
        assert found.arithmetic == "float64"


@pytest.mark.parametrize("bug", FLOAT32_BUGS)
@pytest.mark.parametrize("name", ["reveal-gqa", "reveal-mqa"])
def test_each_bug_is_named(name, bug):
    trace = dump(find(name), {bug})
    fewer = [only(trace, "logits"), only(trace, "out", "logits")] if name == "reveal-gqa" else []
    for part in (trace, *fewer):
        found = diagnose(part, name)
        if name == "reveal-mqa" and bug in ("D2", "E6"):  # no position beyond 256, one key head
            assert not found.needed
            continue
        assert found.needed
        assert found.first.keys == (bug,)
        assert not found.tied
        assert found.basis == ("logits" if len(part.tensors) == 1 else "trace")


@pytest.mark.parametrize("pair", [("B1", "B9"), ("A1", "E6"), ("C1", "D2"), ("A3", "D7"), ("B2", "B8"), ("D2", "D9")])
def test_two_bugs_are_named_together(pair):
    trace = dump(find("reveal-gqa"), pair)
    found = diagnose(trace, "reveal-gqa")
    assert set(found.first.keys) == set(pair)
    assert not found.tied
    alone = diagnose(trace, "reveal-gqa", pairs=False)
    assert alone.first is None
    assert alone.verdict == "no known bug explains it alone"
    assert ("would leave" in alone.text()) == (pair in (("A1", "E6"), ("C1", "D2"), ("A3", "D7"), ("B2", "B8")))


def test_two_bugs_are_named_from_logits_alone():
    trace = only(dump(find("reveal-gqa"), {"C1", "E6"}), "logits")
    found = diagnose(trace, "reveal-gqa")
    assert found.first.keys == ("C1", "E6")
    assert not found.tied


def test_an_adapter_whose_embedding_is_not_scaled():
    model = find("reveal-lora")
    (delta,) = model.params["embed"].deltas
    base = model.params | {"embed": model.params["embed"].base}
    for bugs, want in (({"A5"}, ("A5",)), ({"A5", "C2"}, ("A5", "C2")), (set(), None)):
        low_rank = (delta.b.astype(np.float64) @ delta.a).T
        logits = truth_logits(base, model.config, model.tokens, model.positions, bugs=bugs, embed_delta=low_rank)
        trace = Trace({"logits": logits}, {"logits": "float64"}, model.tokens, model.positions, model.config)
        found = diagnose(trace, "reveal-lora")
        assert (found.first and found.first.keys) == want


def test_what_cannot_be_told_apart_is_a_tie():
    """So far out all positions in bfloat16 are 131072, and all angles in bfloat16 are equal: both turn nothing."""
    trace = only(dump(find("reveal-far"), {"D2"}), "logits")
    found = diagnose(trace, "reveal-far")
    assert {cause.keys for cause in found.tied} == {("D1",), ("D2",)}
    assert found.first in found.tied
    assert found.verdict.endswith("these numbers cannot tell which")
    assert found.as_dict()["tied"] == [list(cause.keys) for cause in found.tied]
    assert found.text().count("https://") == 2
    whole = diagnose(dump(find("reveal-far"), {"D2"}), "reveal-far")  # the turned heads tell
    assert whole.first.keys == ("D2",)
    assert not whole.tied


def test_tokens_that_were_fed_otherwise():
    model = find("reveal-gqa")
    rows = [row[1:] if model.positions[b, 0] >= 0 else np.delete(row, 3) for b, row in enumerate(model.tokens)]
    places = [row[:-1] if row[0] >= 0 else np.array([-1] * 3 + list(range(4))) for row in model.positions]
    fed = replace(model, tokens=np.array(rows), positions=np.array(places))
    trace = replace(dump(fed), tokens=model.tokens, positions=model.positions)  # what they meant to feed
    for part in (trace, only(trace, "logits")):
        found = diagnose(part, "reveal-gqa")
        assert found.first.keys == ("H1 missing",)
    last = {"logits": trace.tensors["logits"][:, -1:]}
    found = diagnose(replace(trace, tensors=last, meta={"last": "true"}), "reveal-gqa")
    assert found.first.keys == ("H1 missing",)
    both = replace(dump(fed, {"C2"}), tokens=model.tokens, positions=model.positions)
    assert set(diagnose(both, "reveal-gqa").first.keys) == {"C2", "H1 missing"}


def test_tokens_alone_tell_of_bos():
    model = random_model(1, num_tokens=6)
    for first, second, want in ((2, 7, None), (7, 2, "H1 missing"), (2, 2, "H1 double")):
        tokens = model.tokens[:1].copy()
        tokens[0, :2] = first, second
        row = replace(model, tokens=tokens, positions=np.arange(6)[None])
        found = diagnose(dump(row), gemma_of(row))
        assert not found.needed
        assert (found.fed and found.fed.key) == want
        assert found.ok == (want is None)
        assert ("fed wrongly" in found.verdict) == (want is not None)
        later = diagnose(dump(replace(row, positions=row.positions + 300)), gemma_of(row))
        assert later.fed is None  # a later part of a text begins with anything


def test_an_error_that_is_no_known_bug():
    trace = dump(find("reveal-gqa"))
    noise = np.random.default_rng(1).normal(size=trace.tensors["layers.1.mlp.up"].shape) * 1e-3
    broken = replace(trace, tensors=trace.tensors | {"layers.1.mlp.up": trace.tensors["layers.1.mlp.up"] + noise})
    found = diagnose(broken, "reveal-gqa")
    assert found.needed
    assert found.first is None
    assert found.honest.left == ("layers.1.mlp.up", "layers.1.mlp.gated")
    assert found.verdict == "no known bug explains it, alone or with another"
    assert "wrong: layers.1.mlp.up, layers.1.mlp.gated" in found.text()


def test_rounding_that_engines_choose_differently_is_no_bug():
    """At position 131071 angles formed in float32 are off by 0.01, which the bounds of float32 contain."""
    trace, _ = trace_of(find("reveal-far"))
    turned = diagnose_as_float32_engine("rope.frequency")
    assert not turned.needed
    assert [cause.keys for cause in turned.closer] == [("D3",)]
    assert "inside rounding without it: angle as position * (1 / timescale) (D3)" in turned.text()
    divided = diagnose_as_float32_engine()
    assert [cause.keys for cause in divided.closer] == [("D3 divided",)]
    assert diagnose(trace, "reveal-far", arithmetic="float32").closer == ()


def diagnose_as_float32_engine(*points):
    """Diagnosis of our own float32 run whose angles are formed in float32."""
    numerics = FLOAT32
    for point in ("rope.exponent", "rope.timescale", "rope.angle", *points):
        numerics = numerics.with_(point, "float32")
    return diagnose(trace_of(find("reveal-far"), numerics)[0], "reveal-far")


def test_after_an_overflow_nothing_is_compared():
    trace = dump(find("reveal-gqa"), {"C2"})
    late = trace.tensors["layers.1.attn.out"].copy()
    late[0, 3] = np.nan
    found = diagnose(replace(trace, tensors=trace.tensors | {"layers.1.attn.out": late}), "reveal-gqa")
    assert found.first.keys == ("C2",)
    assert (found.overflow, found.ok) == ("layers.1.attn.out", False)
    assert "layers.1.attn.out holds NaN or overflows: causes are sought before it" in found.text()
    huge = trace.tensors | {"layers.1.attn.residual": trace.tensors["layers.1.attn.residual"] * 1e19}
    assert diagnose(replace(trace, tensors=huge), "reveal-gqa").first.keys == ("C2",)  # its squares are not finite
    masked = dump(find("reveal-gqa"))  # what engines add to the scores of unseen keys, and leave at padding
    unseen = masked.tensors["layers.0.attn.probs"] == 0
    for name, at in (("layers.0.attn.scores", unseen), ("embed", masked.positions < 0)):
        masked.tensors[name][at] = -np.inf
    assert diagnose(masked, "reveal-gqa").verdict.startswith("no known bug needed")
    assert diagnose(masked, "reveal-gqa").overflow == ""
    with pytest.raises(
        ValueError, match="the candidate's logits holds NaN or overflows, and nothing before it is given"
    ):
        diagnose(replace(trace, tensors={"logits": np.full_like(trace.tensors["logits"], np.inf)}), "reveal-gqa")


def test_an_overflow_is_not_well_though_all_before_it_is():
    trace = dump(find("reveal-gqa"))
    broken = trace.tensors["layers.1.mlp.gate"].copy()
    broken[2, 5, 3] = np.nan
    found = diagnose(replace(trace, tensors=trace.tensors | {"layers.1.mlp.gate": broken}), "reveal-gqa")
    assert (found.ok, found.needed, found.overflow) == (False, False, "layers.1.mlp.gate")
    assert found.verdict == "layers.1.mlp.gate holds NaN or overflows, and all before it is inside rounding"
    assert found.as_dict()["overflow"] == "layers.1.mlp.gate"


@pytest.mark.parametrize("bug", [None, "C1", "E6"])
def test_a_trace_of_the_last_position_with_its_scores(bug):
    """How many keys were scored tells that no other number of tokens was fed."""
    trace = dump(find("reveal-gqa"), {bug} if bug else ())
    ends = trace.positions.shape[1] - 1 - (trace.positions[:, ::-1] >= 0).argmax(axis=1)
    rows = np.arange(len(ends))
    tensors = {
        name: value[rows, :, ends][:, :, None] if name.endswith(("scores", "probs")) else value[rows, ends][:, None]
        for name, value in trace.tensors.items()
    }
    found = diagnose(replace(trace, tensors=tensors, meta={"last": "true"}), "reveal-gqa")
    assert (found.ok, found.first and found.first.keys) == (bug is None, (bug,) if bug else None)
    assert "H1" not in found.text()


def test_logits_of_the_last_positions():
    trace = dump(find("reveal-gqa"), {"C1"})
    last = replace(trace, tensors={"logits": trace.tensors["logits"][:, -3:]}, meta={"last": "true"})
    assert diagnose(last, "reveal-gqa").first.keys == ("C1",)
    swapped = replace(last, tensors={"logits": trace.tensors["logits"][:, -3:][:, ::-1]})
    assert diagnose(swapped, "reveal-gqa", pairs=False).first is None


def test_narrow_logits_say_that_they_hide_fine_bugs():
    model = find("reveal-gqa")
    trace, _ = trace_of(model, PROFILES["bf16-transformers"])
    logits = replace(trace, tensors={"logits": trace.tensors["logits"]})
    for part, hides in ((trace, False), (logits, True)):
        found = diagnose(part, "reveal-gqa", arithmetic="bfloat16")
        assert (found.ok, found.hides) == (True, hides)
        assert ("bfloat16 logits alone cannot show fine bugs, such as A2, B4" in found.text()) == hides
        assert ("a trace of what each layer computes would show them" in found.text()) == hides
        assert found.verdict.endswith("behind which fine bugs hide") == hides


def test_explanations_are_a_tie_within_a_factor_of_three():
    causes = [Cause((bug_of(key),), 0.5, misfit, ()) for key, misfit in (("C1", 1e-6), ("C2", 2.9e-6), ("C3", 4e-6))]
    found = Diagnosis(
        causes=tuple(causes), honest=Cause((), 100.0, 1e-3, ("logits",)), basis="logits", arithmetic="float32"
    )
    assert [cause.keys for cause in found.tied] == [("C1",), ("C2",)]
    assert replace(found, causes=(causes[0], causes[2])).tied == ()


@pytest.mark.parametrize("bug", ["B4", "B5", "D1", "D1 table"])
def test_what_one_bug_explains_is_not_said_of_it_and_another(bug):
    """Beside a bug that rounds, others that show nothing here explain the numbers no less, and are not needed."""
    gemma = tiny_it()
    tokens = np.random.default_rng(3).integers(110, 1000, size=(1, 9))
    honest = Setup(
        params=gemma.params, config=gemma.config, tokens=tokens, positions=np.arange(9)[None], numerics=FLOAT32
    )
    for setup in bug_of(bug).setups(honest):
        logits = run(setup)
        trace = Trace({"logits": logits}, {"logits": "float32"}, tokens, honest.positions, gemma.config)
        found = diagnose(trace, gemma, arithmetic="float32")
        assert (found.first.keys, found.tied) == ((bug,), ())
        assert [cause.keys for cause in found.causes if cause.explains] == [(bug,)]


def test_bad_input_is_a_sentence():
    trace = dump(MODELS[0])
    with pytest.raises(ValueError, match="holds no tensor that is recognised"):
        diagnose(replace(trace, tensors={}), "reveal-gqa")
    with pytest.raises(ValueError, match="all tokens of the candidate are padding"):
        diagnose(replace(trace, positions=np.full_like(trace.positions, -1)), "reveal-gqa")
    with pytest.raises(ValueError, match="unknown arithmetic 'float31': expected one of float32"):
        diagnose(trace, "reveal-gqa", arithmetic="float31")
    with pytest.raises(FileNotFoundError):
        diagnose(trace, "reveal-nothing")
    with pytest.raises(FileNotFoundError):
        diagnose("nowhere.npy", "reveal-gqa")


def test_progress_is_told_of_every_explanation():
    seen = []
    trace = only(dump(find("reveal-gqa"), {"B1", "E6"}), "logits")
    diagnose(trace, "reveal-gqa", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    totals = {total for _, total in seen}
    assert len(totals) == 2  # singles, then pairs
    assert max(totals) <= len(list(combinations(range(32), 2)))


def narrowed(trace, dtype):
    """A dump written down in half precision, of the tensors that hooks see."""
    kept = only(trace, *SEEN)
    tensors = {name: NARROW[dtype](value.astype(np.float32)) for name, value in kept.tensors.items()}
    return replace(kept, tensors=tensors, dtypes=dict.fromkeys(tensors, "float32"), config=None)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bug", [None, *FLOAT32_BUGS])
def test_a_wide_run_that_was_stored_in_half_precision(dtype, bug):
    """It is explained as what it is; a bug smaller than what storing took away is none in these numbers."""
    found = diagnose(narrowed(dump(find("reveal-gqa"), {bug} if bug else ()), dtype), "reveal-gqa", pairs=False)
    assert found.arithmetic == "float32"
    assert f"judged as float32: only stored as {dtype}" in found.text()
    assert (found.ok, found.first and found.first.keys) == (bug is None, (bug,) if bug else None)
    assert not found.tied
    by_logits = (bug, dtype) == ("E2", "bfloat16")  # scores would show it, which hooks do not see
    assert found.basis == ("logits" if by_logits else "trace")
    assert ("each operation is inside its bound, but the logits" in found.text()) == by_logits


@pytest.mark.parametrize("kept", [1, 3])
def test_logits_of_the_last_positions_beside_tensors_of_all(kept):
    def cut(trace):
        ends = {"logits": trace.tensors["logits"][:, -kept:]}
        return replace(trace, tensors=dict(trace.tensors) | ends, ends=frozenset(ends))

    assert diagnose(cut(dump(find("reveal-gqa"))), "reveal-gqa").ok
    for bugs in ({"A3"}, {"C1"}, {"A3", "C1"}):  # in the head alone, in the layers alone, in both
        found = diagnose(cut(dump(find("reveal-gqa"), bugs)), "reveal-gqa").first
        assert found is not None
        assert set(found.keys) == bugs
