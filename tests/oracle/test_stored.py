"""Float32 runs that were saved in half precision: told from runs that computed in it, and a bug in them still found."""

from dataclasses import replace

import numpy as np
import pytest

from refgemma.numerics import from_bfloat16, to_bfloat16
from refgemma.oracle import compare
from refgemma.oracle.bounds.arithmetic import UNIT, storage_slack
from refgemma.oracle.judging.free_run import drift
from refgemma.oracle.judging.grades import Finding
from refgemma.oracle.judging.selection import as_stored, looks_stored
from tests.bfloat16 import narrow_params
from tests.models import random_model
from tests.oracle.gemmas import gemma_of
from tests.oracle.test_forced import run

NARROW = {
    "float16": lambda x: x.astype(np.float16).astype(np.float32),
    "bfloat16": lambda x: from_bfloat16(to_bfloat16(x.astype(np.float32))),
}
# What hooks on modules see.
SEEN = (
    "embed", "attn.norm", "attn.q", "attn.k", "attn.v", "attn.out", "mlp.norm", "mlp.gate", "mlp.up", "mlp.act",
    "mlp.down", "out", "final_norm", "logits",
)  # fmt: skip
HALF = pytest.mark.parametrize("dtype", NARROW)
FORMAT = pytest.mark.parametrize("file", ["as it is", "widened again"])


def saved(trace, dtype, file="as it is"):
    """A trace written down in half precision; NumPy has no bfloat16, so many files hold such numbers as float32."""
    kept = {n: NARROW[dtype](x) for n, x in trace.tensors.items() if n.endswith(SEEN)}
    formats = dict.fromkeys(kept, dtype if file == "as it is" else "float32")
    return replace(trace, tensors=kept, dtypes=formats, config=None)


def test_what_storing_takes_away_is_at_most_half_a_unit_and_reaches_it():
    rng = np.random.default_rng(0)
    for dtype, narrow in NARROW.items():
        x = (rng.normal(size=100_000) * 10.0 ** rng.uniform(-8, 3, size=100_000)).astype(np.float32)
        off, most = (
            np.abs(narrow(x).astype(np.float64) - x),
            storage_slack(narrow(x).astype(np.float64), dtype, "float32"),
        )
        assert np.all(off <= most)
        large = np.abs(x) > 2.0**-10  # among normal numbers of float16, too
        assert (off / most)[large].max() > 0.99
    # float16 has no numbers below 2**-24: half of that is all that is lost there, and not the smallest normal one.
    assert storage_slack(np.zeros(1), "float16", "float32") == 2.0**-25
    assert storage_slack(np.ones(1), "bfloat16", "float32") == UNIT["bfloat16"]
    # Bfloat16 has fewer digits than float16, and far smaller numbers.
    assert (
        storage_slack(np.ones(1), "float16", "bfloat16")
        == storage_slack(np.zeros(1), "float16", "bfloat16")
        == 2.0**-25
    )
    for computed in ("float32", "bfloat16", "float16"):
        for dtype in ("float32", computed, ""):
            assert storage_slack(np.ones(1), dtype, computed) == 0.0


@HALF
@FORMAT
def test_a_float32_run_is_judged_as_what_it_is(dtype, file):
    for seed in range(2):
        model = random_model(seed, num_tokens=17)
        given = saved(run(model), dtype, file)
        report = compare(None, given, model=gemma_of(model, "float64"))
        assert report.ok, seed
        assert report.arithmetic.startswith(f"float32 (only stored as {dtype}: as computed in {dtype}, ")
        assert not compare(None, given, model=gemma_of(model, "float64"), arithmetic=dtype).ok


@HALF
def test_a_bug_in_it_is_found_where_it_is(dtype):
    model = random_model(2, num_tokens=17)
    size = np.float32({"float16": 0.02, "bfloat16": 0.2}[dtype])
    for name in ("layers.0.mlp.act", "layers.0.attn.q", "final_norm"):
        tap = lambda at, x, name=name: x * (1 + size) if at == name else x  # noqa: E731
        report = compare(None, saved(run(model, tap=tap), dtype), model=gemma_of(model, "float64"))
        assert report.arithmetic.startswith("float32 (only stored as")
        assert [one.name for one in report.findings if not one.ok] == [name]


@pytest.mark.parametrize("profile", ["bf16-transformers", "bf16-deepmind"])
def test_a_bfloat16_run_is_not_taken_for_one(profile):
    """Right or not: with one bug of the size of a rounding, and with weights in eight bits in every product."""

    def quantised(w):
        step = np.abs(w).max(axis=1, keepdims=True) / np.float32(127)
        return (np.rint(w / step) * step).astype(np.float32)

    for seed in range(2):
        model = random_model(seed, num_tokens=17)
        judge = gemma_of(model, "float64")
        layers = [
            {part: {k: quantised(w) if w.ndim == 2 else w for k, w in ws.items()} for part, ws in layer.items()}
            for layer in narrow_params(model.params)["layers"]
        ]
        eight_bits = replace(model, params=model.params | {"layers": layers})
        gain = lambda name, x: x * np.float32(1 + 2.0**-6) if name.endswith("norm") else x  # noqa: E731
        runs = run(model, profile), run(model, profile, tap=gain), run(eight_bits, profile)
        for given in (*runs, *(saved(one, "bfloat16") for one in runs)):
            told = compare(None, replace(given, config=None), model=judge, arithmetic=None)
            assert told.arithmetic.startswith("bfloat16 (stored as"), seed
    assert not told.ok  # the last of them: the products are wrong


@HALF
@pytest.mark.parametrize(
    "kinds", [("embed", "out", "final_norm", "logits"), ("final_norm", "logits"), ("mlp.gate", "mlp.act", "mlp.down")]
)
def test_a_few_tensors_of_a_float32_run_are_judged_as_what_they_are(dtype, kinds):
    for seed in range(3):
        model = random_model(seed, num_tokens=17)
        whole = saved(run(model), dtype)
        given = replace(whole, tensors={n: x for n, x in whole.tensors.items() if n.endswith(kinds)})
        assert compare(None, given, model=gemma_of(model, "float64")).ok
        wrong = run(model, tap=lambda at, x: x * np.float32(1.1) if at == "layers.0.mlp.down" else x)
        given = replace(given, tensors={n: saved(wrong, dtype).tensors[n] for n in given.tensors})
        assert not compare(None, given, model=gemma_of(model, "float64")).ok


def test_a_bfloat16_run_saved_as_float16_loses_its_smallest_numbers():
    model = random_model(0, num_tokens=17)
    whole = run(model, "bf16-transformers")
    tiny = {n: x for n, x in whole.tensors.items() if n.endswith(("mlp.gate", "mlp.act"))}
    given = replace(whole, tensors={n: NARROW["float16"](x) for n, x in tiny.items()}, config=None, meta={})
    given = replace(given, dtypes=dict.fromkeys(tiny, "float16"))
    assert any((given.tensors[n] != x).any() for n, x in tiny.items())
    assert compare(None, given, model=gemma_of(model, "float64")).ok


@HALF
def test_drifts_allow_for_it(dtype):
    model = random_model(1, num_tokens=17)
    whole = run(model)
    given = saved(whole, dtype)
    found = drift(model.params, model.config, given, "float32")
    assert {one.grade for one in found} == {"inside rounding"}
    assert all(one.reason.endswith("; and stored more narrowly than that") for one in found)
    assert found[-1].ratio > 0.5  # of half a unit of the format; what float32 itself adds is hardly seen beside it
    # Without that the numbers are those of no float32 engine.
    plain = drift(model.params, model.config, replace(given, dtypes=whole.dtypes), "float32")
    assert plain[-1].grade == "wrong"
    # Two units and more are outside again.
    off = {n: NARROW[dtype](x * np.float32(1 + 3 * UNIT[dtype])) for n, x in whole.tensors.items() if n == "logits"}
    (far,) = drift(model.params, model.config, replace(given, tensors=off), "float32")
    assert far.grade == "wrong"


def test_formats_are_told_tensor_by_tensor():
    model = random_model(1, num_tokens=5)
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    given = replace(
        run(model),
        tensors={
            "embed": x,
            "layers.0.out": NARROW["bfloat16"](x),
            "final_norm": np.zeros((2, 3), np.float32),
            "logits": NARROW["float16"](x),
        },
        dtypes=dict.fromkeys(["embed", "layers.0.out", "final_norm", "logits"], "float32"),
    )
    want = {"embed": "float32", "layers.0.out": "bfloat16", "final_norm": "float32", "logits": "float16"}
    assert as_stored(given).dtypes == want


def test_what_has_to_be_wrong_for_it():
    def look(before, after):
        def findings(grades):
            return [Finding(n, g, 2.0, 1.0, 0.5, (), 0.0, 0.0, "", "") for n, g in grades.items()]

        return looks_stored(findings(before), findings(after))

    some = {"final_norm": "wrong", "logits": "wrong", "embed": "inside rounding"}

    right = dict.fromkeys(some, "inside rounding")
    assert look(some, right)  # a product and a norm
    assert not look(some, right | {"embed": "wrong"})  # as stored as much is wrong
    assert not look(some | {"final_norm": "not given", "embed": "inside rounding"}, right)  # products alone: weights
    assert not look(some | {"logits": "inside rounding"}, right)  # a norm alone
    more = dict.fromkeys(["layers.0.mlp.act", "layers.0.mlp.down"], "inside rounding")
    assert not look(some | more, right | more)  # two kinds of five
    norms = dict.fromkeys(["layers.0.attn.norm", "layers.0.mlp.norm", "final_norm"], "wrong")
    others = dict.fromkeys(["layers.0.attn.q", "layers.0.mlp.act", "logits"], "wrong")
    assert look(norms | others, norms | dict.fromkeys(others, "inside rounding"))  # one bug is in all norms
    assert not look(norms | others, norms | others | {"logits": "inside rounding"})
    assert not looks_stored([], [])
