"""Comparing: honest traces pass, a planted bug is named where it is, whatever else the other engine left out."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import refgemma
import refgemma.model
from refgemma.config import Config
from refgemma.errors import grouped
from refgemma.model import forward
from refgemma.numerics import from_bfloat16
from refgemma.oracle import Trace, compare, trace
from refgemma.oracle.bounds import flow
from refgemma.oracle.formula_models import formula
from refgemma.oracle.judging.grades import Finding, not_given
from refgemma.oracle.report import Report
from refgemma.oracle.traces.recording import fingerprint
from tests.models import random_model
from tests.oracle.gemmas import gemma_of
from tests.peers.make_bfloat16_goldens import golden_model
from tests.tiny_it import tiny_it

TOKENS = [2, 106, 645, 108, 300, 11]
GOLDENS = Path(__file__).parents[1] / "goldens"
MODEL = random_model(7, num_tokens=12, num_layers=3)
GEMMA = gemma_of(MODEL)
TRUTH = gemma_of(MODEL, "float64")  # what is judged by


def theirs_of(model=MODEL, **options):
    """Our float32 run, as though it were somebody else's."""
    return replace(trace(gemma_of(model), model.tokens, positions=model.positions, **options), meta={}, config=None)


@pytest.fixture
def erf_in_layer_1(monkeypatch):
    """GELU by erf in one layer of every run."""
    honest, calls = refgemma.model.gelu, 0

    def gelu(gate, *, numerics):
        nonlocal calls
        calls += 1
        if calls % MODEL.config.num_layers == 2:
            return (gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))).astype(gate.dtype)
        return honest(gate, numerics=numerics)

    monkeypatch.setattr(refgemma.model, "gelu", gelu)
    yield
    monkeypatch.undo()


@pytest.fixture
def wrong(erf_in_layer_1, monkeypatch):
    """A trace with that bug; what judges it has it no more."""
    found = theirs_of()
    monkeypatch.undo()
    return found


def without(trace, *endings):
    kept = {name: value for name, value in trace.tensors.items() if not name.endswith(endings)}
    return replace(trace, tensors=kept, dtypes={name: trace.dtypes[name] for name in kept})


def only(trace, *names):
    return replace(trace, tensors={n: trace.tensors[n] for n in names}, dtypes={n: trace.dtypes[n] for n in names})


@pytest.mark.parametrize("seed", range(4))
def test_an_honest_trace_passes(seed):
    model = random_model(seed, num_tokens=9)
    report = compare(None, theirs_of(model), model=gemma_of(model, "float64"))
    assert report.ok
    assert report.first_divergence is None
    assert len(report.findings) == 3 + 18 * model.config.num_layers
    assert {finding.grade for finding in report.findings} <= {"inside rounding", "suspicious"}
    assert report.drift.name == "logits"
    assert [one.name for one in report.drifts][:3] == ["embed", "layers.0.attn.residual", "layers.0.out"]
    assert report.arithmetic == "float32 (stored as float32)"
    assert "nothing is wrong" in report.text()


def test_a_bug_is_named_at_its_operation(wrong):
    report = compare(None, wrong, model=TRUTH)
    assert not report.ok
    assert report.first_divergence.name == "layers.1.mlp.act"
    assert [one.name for one in report.findings if not one.ok] == ["layers.1.mlp.act"]  # one error is one finding
    assert not report.drift.ok
    text = report.text().splitlines()
    assert text[2].startswith("WRONG at layers.1.mlp.act, the first of 1 wrong, ")
    assert text[3].startswith("  error ")


def test_missing_tensors_are_bridged(wrong):
    fewer = without(wrong, "mlp.gate", "mlp.gated", "attn.scores")
    report = compare(None, fewer, model=TRUTH)
    assert report.first_divergence.name == "layers.1.mlp.act"
    assert {one.name for one in report.findings if one.grade == "not given"} == {
        f"layers.{i}.{kind}" for i in range(3) for kind in ("mlp.gate", "mlp.gated", "attn.scores")
    }
    assert (
        "not given, replaced by the reference's: layers.*.attn.scores (3 of them), layers.*.mlp.gate (3 of them)"
        in report.text()
    )
    without_act = without(wrong, "mlp.act")
    assert compare(None, without_act, model=TRUTH).first_divergence.name == "layers.1.mlp.gated"
    assert compare(None, without(theirs_of(), "mlp.act", "attn.q"), model=TRUTH).ok


def test_only_logits_are_compared_free_running(wrong):
    for given in (only(wrong, "logits"), replace(only(theirs_of(last=True), "logits"), meta={"last": "true"})):
        report = compare(None, given, model=TRUTH)
        assert report.findings == ()
        assert [one.name for one in report.drifts] == ["logits"]
        assert report.ok == (given.last)
        assert report.first_divergence is (None if given.last else report.drift)
    assert "WRONG: logits, each engine run by itself\n" in compare(None, only(wrong, "logits"), model=TRUTH).text()


def test_what_was_left_out_stands_under_the_verdict():
    given = replace(without(theirs_of(), "logits"), notes=("a note", "left out: logits has another shape"))
    lines = compare(None, given, model=TRUTH).text().split("\n")
    assert lines[2].startswith("nothing is wrong: ")
    assert "left out: logits has another shape" in lines[3:5]
    assert "a note" not in lines


def test_last_positions_are_judged(wrong):
    last = theirs_of(last=True)
    kept = replace(last, meta={"last": "true"})
    assert compare(None, kept, model=TRUTH).ok
    changed = dict(kept.tensors)
    changed["layers.2.mlp.up"] = changed["layers.2.mlp.up"] * np.float32(1.01)
    report = compare(None, replace(kept, tensors=changed), model=TRUTH)
    assert report.first_divergence.name == "layers.2.mlp.up"


def test_logits_of_the_last_position_beside_tensors_of_all():
    whole, last = theirs_of(), theirs_of(last=True)
    logits = last.tensors["logits"]
    given = replace(whole, tensors=dict(whole.tensors) | {"logits": logits}, ends=frozenset({"logits"}))
    report = compare(None, given, model=TRUTH)
    assert report.ok
    assert report.findings[-1].name == report.drift.name == "logits"
    assert report.findings[-1].grade == "inside rounding"
    assert report.findings[-2].grade == "inside rounding"  # of every position
    # The last number is judged by the very vector it was made from: one part in 10,000 is seen.
    report = compare(
        None, replace(given, tensors=dict(given.tensors) | {"logits": logits * np.float32(1.0001)}), model=TRUTH
    )
    assert report.first_divergence.name == "logits"
    assert [one.name for one in report.findings if not one.ok] == ["logits"]


@pytest.mark.parametrize("kept", [2, 5])
def test_logits_of_the_last_few_positions(kept, monkeypatch):
    """Each is judged, at its own position, whether the rest of the trace is there or not, in chunks or at once."""
    model = random_model(6, num_tokens=12, num_layers=2)
    positions = np.tile(np.arange(12), (len(model.tokens), 1))
    positions[0] = [-1, -1, *range(10)]  # on the left there may be padding
    judge = gemma_of(model, "float64")
    whole = replace(trace(gemma_of(model), model.tokens, positions=positions), meta={}, config=None)
    few = whole.tensors["logits"][:, -kept:]
    alone = replace(whole, tensors={"logits": few}, meta={"last": "true"})
    beside = replace(whole, tensors=dict(whole.tensors) | {"logits": few}, ends=frozenset({"logits"}))
    for chunk in (512, 4):
        monkeypatch.setattr(flow, "_CHUNK", chunk)
        for given in (alone, beside):
            report = compare(None, given, model=judge)
            assert report.ok
            assert report.drift.name == "logits"
            assert [one.name for one in report.drifts].count("logits") == 1
            for t in {0, kept - 1}:
                off = few.copy()
                off[-1, t, 3] += 0.5
                found = compare(None, replace(given, tensors=dict(given.tensors) | {"logits": off}), model=judge)
                assert found.drift.where == (len(few) - 1, 12 - kept + t, 3)
                assert found.first_divergence.where == found.drift.where
    assert report.findings[-1].name == "logits"
    assert report.findings[-1].grade == "inside rounding"


@pytest.mark.parametrize("kept", [1, 3, 11])
def test_logits_one_position_earlier_are_no_verdict(kept):
    """Tokens as `generate` returns them, the last one drawn and not fed; or a port that returns the wrong position."""
    positions = np.tile(np.arange(12), (len(MODEL.tokens), 1))
    logits = forward(GEMMA.params, MODEL.config, MODEL.tokens, positions=positions)
    few = logits[:, -1 - kept : -1]
    given = Trace({"logits": few[:, -1:]}, {"logits": "float32"}, MODEL.tokens, positions, meta={"last": "true"})
    given = replace(given, ends={"logits": few} if kept > 1 else {})
    with pytest.raises(ValueError, match="the trace: 11 positions were fed, 12 tokens given, for its logits are right"):
        compare(None, given, model=TRUTH)
    shifted = few * np.float32(1.01)  # wrong there, too
    other = replace(given, tensors={"logits": shifted[:, -1:]}, ends={"logits": shifted} if kept > 1 else {})
    assert not compare(None, other, model=TRUTH).ok


@pytest.mark.parametrize("engine", ["transformers", "deepmind"])
def test_recorded_bfloat16_runs_pass_as_what_they_are(engine):
    model = golden_model()
    with np.load(GOLDENS / f"bfloat16_{engine}.npz") as arrays:
        tensors = {name: from_bfloat16(arrays[name]) for name in arrays}
    given = Trace(tensors, dict.fromkeys(tensors, "float32"), model.tokens, model.positions)
    judge = gemma_of(model, "float64")
    told = compare(None, given, model=judge)
    assert told.arithmetic == "bfloat16 (stored as float32, but most numbers are bfloat16 numbers)"
    own = compare(None, given, model=judge, arithmetic=f"bf16-{engine}")
    assert own.ok
    assert own.arithmetic == f"bf16-{engine}"
    assert not compare(None, given, model=judge, arithmetic="float32").ok


def test_googles_own_run_with_few_tensors_passes():
    c = Config.uniform(
        vocab_size=40, hidden_size=24, intermediate_size=64, num_layers=3, num_heads=4, num_kv_heads=1, head_dim=8,
        max_positions=8192, rope_theta=10_000.0, rms_norm_eps=1e-6, query_scale=8**-0.5, tie_word_embeddings=True,
    )  # fmt: skip
    with np.load(GOLDENS / "deepmind_gemma1_mqa.npz") as arrays:
        weights = {name.removeprefix("weights/"): arrays[name].astype(np.float64) for name in arrays}
    layers = []
    for i in range(3):
        at = {name.removeprefix(f"layer_{i}/"): w for name, w in weights.items() if name.startswith(f"layer_{i}/")}
        heads = [at["attn/q_einsum/w"], *at["attn/kv_einsum/w"]]
        q, k, v = (w.swapaxes(-1, -2).reshape(-1, 24) for w in heads)
        gate, up = at["mlp/gating_einsum"]
        layers.append(
            {
                "attn": {
                    "norm": at["pre_attention_norm/scale"],
                    "q": q,
                    "k": k,
                    "v": v,
                    "out": at["attn/attn_vec_einsum/w"].reshape(-1, 24).T,
                },
                "mlp": {"norm": at["pre_ffw_norm/scale"], "gate": gate.T, "up": up.T, "down": at["mlp/linear"].T},
            }
        )
    embed = weights["embedder/input_embedding"]
    params = {"embed": embed, "layers": layers, "final_norm": weights["final_norm/scale"], "head": embed}
    gemma = replace(TRUTH, config=c, params=params)
    report = compare(None, GOLDENS / "deepmind_gemma1_mqa.npz", model=gemma)
    assert report.ok
    assert sum(one.grade != "not given" for one in report.findings) == 4
    silu = replace(gemma, params=params | {"layers": [layers[0], layers[1], layers[2] | {"mlp": layers[1]["mlp"]}]})
    assert compare(None, GOLDENS / "deepmind_gemma1_mqa.npz", model=silu).first_divergence.name == "layers.2.out"


def test_ours_names_the_model_and_the_tokens(tmp_path):
    gemma, tokens = tiny_it(), [2, 651, 645, 576]
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.npz"
    made = trace(gemma, tokens, to=ours, model="tiny-it", names="logits")
    np.savez(theirs, lm_head=made.tensors["logits"])
    assert compare(ours, theirs).ok
    assert compare(ours, theirs, model="tiny-it").model == "tiny-it"
    assert compare(ours, ours).arithmetic == "float32 (as its metadata says)"
    np.savez(theirs, lm_head=made.tensors["logits"] * np.float32(1.001))
    report = compare(ours, theirs)
    assert not report.ok
    assert report.candidate == str(theirs)


def test_weights_are_known_however_they_are_held():
    prints = {fingerprint(tiny_it("float32", weights).params) for weights in ("float32", "bfloat16")}
    prints.add(fingerprint(tiny_it("float64").params))
    assert len(prints) == 1
    others = [gemma_of(random_model(seed)) for seed in range(3)]
    layer = others[0].params["layers"][0]
    others.append(
        replace(
            others[0],
            params=others[0].params | {"layers": [layer | {"mlp": layer["mlp"] | {"up": -layer["mlp"]["up"]}}]},
        )
    )
    assert len({fingerprint(gemma.params) for gemma in others} | prints) == 5


def test_positions_are_ours():
    theirs = theirs_of()
    shifted = np.where(MODEL.real, theirs.positions + 1, -1)
    report = compare(
        trace(GEMMA, MODEL.tokens, positions=MODEL.positions), replace(theirs, positions=shifted), model=TRUTH
    )
    assert report.ok  # what they computed is right for our positions, whatever they say
    assert report.notes == ("has other positions than the reference trace, which it is judged by",)
    assert not compare(None, replace(theirs, positions=shifted), model=TRUTH).ok


def test_numbers_that_are_not_finite_are_wrong():
    theirs = theirs_of()
    changed = dict(theirs.tensors)
    changed["layers.1.attn.q"] = changed["layers.1.attn.q"].copy()
    changed["layers.1.attn.q"][0, 3, 0, 0] = np.nan
    report = compare(None, replace(theirs, tensors=changed), model=TRUTH)
    assert report.first_divergence.name == "layers.1.attn.q"
    assert report.first_divergence.where == (0, 3, 0, 0)


@pytest.mark.parametrize("size", [1e20, 1e300])
@pytest.mark.parametrize("kind", ["attn.q", "attn.v", "mlp.gate", "out"])
def test_numbers_that_overflow_are_wrong_and_warn_of_nothing(kind, size):
    theirs, name = theirs_of(), f"layers.1.{kind}"
    changed = {n: value.astype(np.float64) for n, value in theirs.tensors.items()}
    at = (0, 3, 0, 0)[: changed[name].ndim]
    changed[name][at] = size
    # A number that is a tenth off somewhere else, right behind it, is not lost in what cannot be told any more.
    behind = {"attn.q": "attn.q_rope", "attn.v": "attn.mix", "mlp.gate": "mlp.act", "out": None}[kind]
    if behind:
        changed[f"layers.1.{behind}"][1, 2] *= 1.1
    given = replace(theirs, tensors=changed, dtypes=dict.fromkeys(changed, "float64"))
    report = compare(None, given, model=TRUTH, arithmetic="float32")  # warnings are errors
    assert report.first_divergence.name == name
    assert report.first_divergence.where == at
    if behind:
        assert f"layers.1.{behind}" in [one.name for one in report.findings if not one.ok]


def test_tokens_may_be_given(tmp_path):
    theirs = theirs_of()
    positions = np.tile(np.arange(12), (len(MODEL.tokens), 1))
    np.save(tmp_path / "logits.npy", forward(GEMMA.params, MODEL.config, MODEL.tokens, positions=positions))
    assert compare(None, tmp_path / "logits.npy", model=TRUTH, tokens=MODEL.tokens).ok
    ours = trace(GEMMA, MODEL.tokens, positions=MODEL.positions)
    with pytest.raises(ValueError, match="the reference trace says which tokens were fed: no others can be given"):
        compare(ours, theirs, model=TRUTH, tokens=MODEL.tokens)


def test_bad_use_is_a_sentence(tmp_path):
    theirs, ours = theirs_of(), trace(GEMMA, MODEL.tokens, positions=MODEL.positions)
    other = replace(TRUTH, params=TRUTH.params | {"final_norm": TRUTH.params["final_norm"] + 1})
    np.savez(tmp_path / "theirs.npz", logits=theirs.tensors["logits"])
    for arguments, options, words in [
        ((None, theirs), {}, "no model is given: give a reference trace"),
        ((ours, theirs), {}, "the reference trace does not name its model"),
        (
            (tmp_path / "theirs.npz", theirs),
            {"model": TRUTH},
            r"theirs\.npz is not a trace written by refgemma: give one first",
        ),
        ((None, tmp_path / "theirs.npz"), {"model": TRUTH}, "holds no token ids"),
        (
            (ours, replace(theirs, tokens=theirs.tokens + 1)),
            {"model": TRUTH},
            "has other tokens than the reference trace: row 0 has",
        ),
        (
            (ours, replace(theirs, tokens=theirs.tokens[:, 1:])),
            {"model": TRUTH},
            "other tokens than the reference trace: .* shape",
        ),
        ((ours, theirs), {"model": gemma_of(random_model(1), "float64")}, "is a trace of another model than"),
        ((ours, theirs), {"model": other}, "was traced with other weights than the model has now"),
        ((ours, only(theirs)), {"model": TRUTH}, "holds no tensor: there is nothing to judge"),
        (
            (None, replace(theirs, positions=np.full_like(theirs.positions, -1))),
            {"model": TRUTH},
            "every position is padding",
        ),
        (
            (ours, theirs),
            {"model": TRUTH, "arithmetic": "int4"},
            "unknown arithmetic 'int4': expected one of float32, ",
        ),
        (
            (replace(ours, meta={"model": "m", "adapters": '["pirate"]'}), theirs),
            {},
            'with the adapters "pirate": give',
        ),
    ]:
        with pytest.raises(ValueError, match=words) as raised:
            compare(*arguments, **options)
        assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        compare(tmp_path / "absent.safetensors", theirs)


def test_the_report_in_json(wrong):
    report = compare(None, wrong, model=TRUTH)
    shown = json.loads(json.dumps(report.as_dict()))
    assert shown["ok"] is False
    assert shown["first_divergence"]["name"] == "layers.1.mlp.act"
    assert [one["name"] for one in shown["findings"]] == [one.name for one in report.findings]
    assert shown["drift"][-1]["name"] == "logits"
    assert shown["tokens"] == list(MODEL.tokens.shape)


def made_up(*findings, drifts=()):
    return Report(
        candidate="theirs",
        model="m",
        shape=(1, 2),
        arithmetic="float32",
        findings=findings,
        drifts=drifts,
        notes=("a note",),
    )


def test_what_logits_alone_cannot_show_is_said():
    logits = finding("logits", 0.5, "inside rounding")
    for arithmetic, words in [
        (
            "bfloat16 (stored as bfloat16)",
            "bfloat16 logits alone hide bugs of the size of a rounding (A2, B4, B5, B6, G1): ",
        ),
        ("bf16-deepmind", "bfloat16 logits alone hide bugs"),
        ("float16", "float16 logits alone hide bugs of the size of a rounding: a trace shows them; if they were"),
        ("float32 (stored as float32)", ""),
    ]:
        report = replace(made_up(drifts=(logits,)), arithmetic=arithmetic)
        assert report.hidden.startswith(words)
        assert bool(report.hidden) == bool(words) == ("hide bugs" in report.text())
        assert report.as_dict()["hidden"] == report.hidden
        whole = replace(report, findings=(finding("embed", 0.5, "inside rounding"),))
        wrong = replace(report, drifts=(finding("logits", 2.0, "wrong"),))
        assert whole.hidden == wrong.hidden == ""


def finding(name, ratio, grade, pattern=""):
    return Finding(name, grade, ratio, 0.5 * ratio, 0.5, (0, 1, 2), 1.25, 0.75, pattern, "the reason", ratio)


def test_the_text_of_a_report():
    right, off = finding("embed", 0.25, "inside rounding"), finding("layers.0.out", 12.0, "wrong", "only odd lanes")
    text = made_up(right, not_given("layers.0.attn.q"), off, drifts=(finding("logits", 2.0, "wrong"),)).text()
    assert text.splitlines() == [
        "theirs against m, 1 x 2 tokens, as float32",
        "",
        "WRONG at layers.0.out, the first of 1 wrong, 1 inside rounding, 1 not given",
        "  error 6 is 12 of its bound 0.5",
        "  at [0, 1, 2]: candidate 1.25, reference 0.75",
        "  pattern: only odd lanes",
        "  bound: the reason",
        "",
        "every operation on its own inputs, in the order of the computation",
        "  operation     grade            error/bound  error  bound  pattern",
        "  embed         inside rounding         0.25  0.125    0.5",
        "  layers.0.out  wrong                     12      6    0.5  only odd lanes",
        "",
        "not given, replaced by the reference's: layers.0.attn.q",
        "",
        "each engine run by itself",
        "  operation  grade  error/budget  error  budget  pattern",
        "  logits     wrong             2      1     0.5",
        "  budget of logits: the reason",
        "",
        "read as",
        "  a note",
    ]
    drifted = made_up(right, drifts=(finding("logits", 2.0, "wrong"),))
    assert not drifted.ok
    assert "WRONG: logits, each engine run by itself; no single operation is, of those given" in drifted.text()
    assert grouped(["embed", "layers.0.out", "layers.12.out"]) == ["embed", "layers.*.out (2 of them)"]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture(wrong, tmp_path, ending):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install refgemma[plot]")
    path = tmp_path / f"report.{ending}"
    compare(None, wrong, model=TRUTH).picture(path)
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending])
    if ending == "svg":
        assert "layers.1.mlp.act" in path.read_text()


def test_pictures_of_extremes(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install refgemma[plot]")
    zero, endless = finding("embed", 0.0, "inside rounding"), finding("logits", math.inf, "wrong")
    for report in (
        made_up(zero),
        made_up(zero, endless, drifts=(endless,)),
        made_up(drifts=(endless,)),
        made_up(zero, drifts=(zero,)),
    ):
        report.picture(tmp_path / "report.png")
    with pytest.raises(ValueError, match=r"report\.txt ends in '\.txt': expected \.png, \.svg, \.pdf"):
        made_up(zero).picture(tmp_path / "report.txt")


@pytest.fixture(scope="module")
def with_pirate():
    return refgemma.load("tiny-it", lora="pirate:0.5")


def test_a_model_with_an_adapter_on_it(with_pirate, tmp_path):
    path = tmp_path / "pirate.safetensors"
    ours = trace(with_pirate, TOKENS, to=path)
    assert (ours.meta["model"], json.loads(ours.meta["adapters"])) == ("tiny-it", ["pirate:0.5"])
    assert compare(path, path, lora="pirate:0.5").ok
    assert compare(ours, path, model=with_pirate).ok
    with pytest.raises(
        ValueError, match=r'the reference trace was made with the adapters "pirate:0\.5": give them as well'
    ):
        compare(path, path)


def test_an_adapter_of_another_scale_is_found_at_the_first_operation_it_is_on(with_pirate):
    ours = trace(with_pirate, TOKENS)
    report = compare(ours, ours, lora="pirate:0.51")
    assert report.first_divergence.name == "layers.0.attn.q"


def test_merged_weights_are_within_rounding_of_the_attached_adapter(with_pirate):
    """In float32 a merge rounds each weight once, which the bound of a product allows for; in bfloat16 it is seen."""
    assert compare(None, trace(with_pirate.merge_lora(), TOKENS), model=with_pirate).ok
    rounded = refgemma.load("tiny-it", weights="bfloat16", lora="pirate:0.5").merge_lora()
    assert not compare(None, trace(rounded, TOKENS), model=with_pirate).ok


def test_logits_of_a_formula_model(tmp_path):
    path = tmp_path / "logits.npy"
    known = formula.find("reveal-gqa")
    right = forward(known.params, known.config, known.tokens, positions=known.positions)
    np.save(path, right)
    assert compare(None, path, model="reveal-gqa").ok
    np.save(path, np.where(known.positions[..., None] < 0, right, right * np.float32(1 + 2e-5)))
    assert compare(None, path, model="reveal-gqa").first_divergence.name == "logits"
    with pytest.raises(ValueError, match="give a loaded model with its adapters on"):
        compare(None, path, model="reveal-gqa", lora="pirate")
