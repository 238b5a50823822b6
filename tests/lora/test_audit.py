"""The audit of a merge: against counts by hand, full singular value decompositions, and known figures."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

import refgemma
from refgemma import lora
from refgemma.lora.audit import audit_attached, audit_weight, effective_rank, singular_values
from refgemma.lora.audit_picture import picture
from refgemma.lora.merge import materialise, split, stored_rows
from refgemma.lora.tiles import rounded, widened
from refgemma.numerics import FLOAT32, Bfloat16Matrix, from_bfloat16, to_bfloat16
from refgemma.ops.linear import Adapted, Delta
from tests.lora.folders import PREFIX, factors, model, write
from tests.lora.test_materialise import delta, deltas
from tests.lora.test_rounding import nearest_by_hand
from tests.models import map_params
from tests.ops.weights import values, weight


def audited(new, form="bfloat16", *, old=None, path="layers.0.attn.q"):
    """One row of the audit."""
    return audit_weight(path, new, new.base if old is None else old, form, lambda done: None)[0]


# ---- figures


def expected(size, quantiles=2001):
    """Share unmoved and error of the update for normal W rounded to bfloat16 and normal d, `size` times as large.

    By sums: over all bfloat16 W with their probability, and over equally likely d. Independent of `rounded`.
    """
    steps = 1 + np.arange(128) / 128
    w = (2.0 ** np.arange(-24, -1)[:, None] * steps).ravel()  # what is left out weighs less than 1e-5
    up = 2.0 ** (np.floor(np.log2(w)) - 7)
    down = np.where(w == 2.0 ** np.floor(np.log2(w)), up / 2, up)
    erf = np.vectorize(math.erf)
    p = erf((w + up / 2) / 0.02 / 2**0.5) - erf((w - down / 2) / 0.02 / 2**0.5)  # of either sign
    d = 0.02 * size * normal_quantiles(quantiles)
    unmoved = error = 0.0
    for few in np.array_split(np.arange(len(w)), 64):
        total = w[few, None] + d
        unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(total), 2.0**-60))) - 7)
        merged = np.rint(total / unit) * unit
        unmoved += float(p[few] @ (merged == w[few, None]).mean(axis=1))
        error += float(p[few] @ ((merged - total) ** 2).mean(axis=1))
    return unmoved / p.sum(), math.sqrt(error / p.sum() / np.mean(d**2))


def normal_quantiles(count):
    """Middles of equally likely pieces of a normal distribution, by interpolation in its integral."""
    x = np.linspace(-6, 6, 60_001)
    below = (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2
    return np.interp((np.arange(count) + 0.5) / count, below, x)


@pytest.mark.parametrize(
    ("size", "unmoved", "error"), [(1e-4, 0.98, 0.98), (1e-3, 0.78, 0.80), (3e-3, 0.47, 0.49), (1e-2, 0.18, 0.17)]
)
def test_a_merge_in_bfloat16_eats_the_update(size, unmoved, error):
    """Known bug I1, with the figures of the catalogue: normal W of standard deviation 0.02, |d| / |W| = `size`."""
    n, width = 400_000, 50
    rng = np.random.default_rng([11, round(1 / size)])
    base = Bfloat16Matrix(to_bfloat16((0.02 * rng.normal(size=(n // width, width))).astype(np.float32)))
    change = 0.02 * size * rng.normal(size=base.shape)
    row = audited(Adapted(base, (Delta(a=np.eye(width), b=change, scale=1.0),)))
    assert row.relative_norm == pytest.approx(size, rel=4 * n**-0.5)  # each norm is off by 1 / sqrt(2 n)
    want = expected(size)
    # Four standard deviations of a share; half a millipoint for the sum over d in the place of an integral.
    assert abs(row.unmoved - want[0]) < 4 * math.sqrt(want[0] * (1 - want[0]) / n) + 5e-4
    # The error scattered by 0.1 to 1.4 / sqrt(n) of itself over a dozen other samples: four times 1.5.
    assert row.update_error == pytest.approx(want[1], rel=4 * 1.5 * n**-0.5 + 1e-3)
    # The catalogue prints two digits, of a sample of which no more is known: one in the last of them.
    assert abs(row.unmoved - unmoved) < 0.01
    assert abs(row.update_error - error) < 0.01
    # In float32 all but nothing is lost: half a step is 2 ** -25 of W at most.
    wide = audited(Adapted(from_bfloat16(base.bits), (Delta(a=np.eye(width), b=change, scale=1.0),)), "float32")
    assert wide.update_error < 2.0**-24 / size
    assert wide.unmoved < 1e-3


@pytest.mark.parametrize("table", [False, True], ids=["linear", "table"])
@pytest.mark.parametrize("form", ["bfloat16", "float16", "float32"])
def test_shares_and_errors_are_counted_right(form, table):
    rng = np.random.default_rng(12)
    d = delta(rng, table=table)
    d.b[:] *= np.float32(3e-3)
    d.b[1 if table else 2] = 0  # a row or a column that the adapter leaves alone
    operand = Adapted(weight(rng, 13, 10, "bfloat16"), (d,))
    w = values(operand.base).astype(np.float64)
    change = stored_rows(operand, slice(0, 13), "float64", table=table) - w
    pairs = [(float(x), float(y)) for x, y in zip(w.flat, change.flat, strict=True)]
    merged = [nearest_by_hand(x + y, form) for x, y in pairs]
    still = [m == nearest_by_hand(x, form) for m, (x, y) in zip(merged, pairs, strict=True) if y]
    row = audited(operand, form, path="embed" if table else "layers.0.attn.q")
    assert len(still) < len(pairs)
    assert row.unmoved == sum(still) / len(still)
    error = math.fsum((m - x - y) ** 2 for m, (x, y) in zip(merged, pairs, strict=True))
    # A few dozen roundings; in float32 the error of the update is itself a difference near 2 ** -53 of W over 2 ** -24.
    assert row.update_error == pytest.approx(math.sqrt(error / math.fsum(y * y for _, y in pairs)), rel=1e-8)
    assert row.relative_norm == pytest.approx(np.linalg.norm(change) / np.linalg.norm(w), rel=1e-12)
    assert row.shape == (13, 10)


def test_rounding_the_base_counts_if_it_is_wider():
    rng = np.random.default_rng(13)
    w = rng.normal(size=(40, 30)).astype(np.float32)
    row = audited(Adapted(w, (delta_of_size(rng, 40, 30, 1e-6),)))
    kept = widened(rounded(w.astype(np.float64), "bfloat16"), "bfloat16")
    assert row.update_error > 100  # what becomes of W is far more than the update
    assert row.unmoved > 0.99
    assert row.update_error == pytest.approx(
        np.linalg.norm(kept - w) / (row.relative_norm * np.linalg.norm(w)), rel=0.05
    )


def delta_of_size(rng, outputs, inputs, size, rank=4):
    a, b = rng.normal(size=(rank, inputs)), rng.normal(size=(outputs, rank))
    return Delta(a=a, b=b, scale=size / rank**0.5)


# ---- ranks


@pytest.mark.parametrize("table", [False, True], ids=["linear", "table"])
@pytest.mark.parametrize("count", [1, 2])
def test_singular_values_are_those_of_the_whole_matrix(count, table):
    rng = np.random.default_rng(14)
    few = deltas(rng, table=table)[::-1][:count]  # the one with a gain first
    _, terms = split(Adapted(np.zeros((13, 10)), few), table=table)
    whole = np.zeros((13, 10))
    for d in few:
        own = d.scale * (d.b.astype(np.float64) @ d.a)
        whole += (
            (own if d.gain is None else own * d.gain[:, None]).T
            if table
            else (own if d.gain is None else own * d.gain[:, None])
        )
    want = np.linalg.svd(whole, compute_uv=False)
    got = singular_values(terms)
    assert len(got) == 3 * count
    # Both decompositions are good to some dozen roundings of the largest value.
    assert np.abs(got - want[: len(got)]).max() < 1e-13 * want[0]


def test_effective_rank_is_the_exponential_of_the_entropy():
    # By hand: squares 9, 1 of 10 give the shares 0.9 and 0.1.
    want = math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert effective_rank(np.array([3.0, 1.0])) == pytest.approx(want, rel=1e-14)
    unsquared = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert want != pytest.approx(unsquared, rel=0.1)
    assert effective_rank(np.array([2e-200] * 5)) == pytest.approx(5, rel=1e-14)
    assert effective_rank(np.array([7.0, 0.0])) == 1.0
    assert effective_rank(np.zeros(3)) == 0.0


def test_ranks_tell_room_from_use():
    rng = np.random.default_rng(15)
    d = delta_of_size(rng, 40, 30, 1.0)
    d.b[:, 3] = 2 * d.b[:, 0]  # of four directions of the output, two are the same
    row = audited(Adapted(np.ones((40, 30), np.float32), (d,)), "float32")
    assert (row.rank, row.numerical_rank) == (4, 3)
    assert 1 < row.effective_rank < 3
    one = Delta(a=d.a[:1], b=d.b[:, :1], scale=1.0)
    row = audited(Adapted(np.ones((40, 30), np.float32), (one,)), "float32")
    assert (row.rank, row.numerical_rank, row.effective_rank) == (1, 1, pytest.approx(1, rel=1e-12))


def test_an_adapter_that_was_never_trained():
    """B is zero at the start of training: nothing to lose."""
    operand = Adapted(np.ones((4, 5), np.float32), (Delta(a=np.ones((2, 5)), b=np.zeros((4, 2)), scale=1.0),))
    row = audited(operand)
    assert (row.rank, row.numerical_rank, row.effective_rank, row.relative_norm) == (2, 0, 0.0, 0.0)
    assert math.isnan(row.unmoved)
    assert math.isnan(row.update_error)


def test_singular_values_of_a_few_rows():
    """Rows of zeros change none of them, and are left out: a table has 256,000."""
    rng = np.random.default_rng(18)
    d = delta(rng)
    d.b[[0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]] = 0  # two are left, fewer than the rank
    _, terms = split(Adapted(np.zeros((13, 10)), (d,)))
    found = singular_values(terms)
    want = np.linalg.svd(d.scale * d.b.astype(np.float64) @ d.a.astype(np.float64), compute_uv=False)[:3]
    assert found.shape == (3,)
    assert np.all(np.abs(found - want) <= 50 * 2.0**-53 * want[0])  # some roundings of the largest each


@pytest.mark.parametrize("factored", [False, "plain", "DoRA"])
def test_a_weight_that_was_trained_whole(factored):
    """Its ranks are not known; the change is the new one's, with what factors add to it, against the old."""
    rng = np.random.default_rng(16)
    old = weight(rng, 13, 10, "bfloat16")
    new = values(old) + 1e-3 * rng.normal(size=(13, 10)).astype(np.float32)
    wide = new.astype(np.float64)
    if factored:
        new = Adapted(new, (delta(rng, gain=factored == "DoRA"),))
        wide = stored_rows(new, slice(0, 13), "float64")
    row = audited(new, old=old)
    d = wide - values(old)
    merged = widened(materialise(new, "bfloat16").bits, "bfloat16")
    assert row.relative_norm == pytest.approx(np.linalg.norm(d) / np.linalg.norm(values(old)), rel=1e-6)
    assert row.update_error == pytest.approx(np.linalg.norm(merged - wide) / np.linalg.norm(d), rel=1e-9)
    assert row.rank == (3 if factored else None)
    assert (row.effective_rank is None) is not bool(factored)


# ---- a model


@pytest.fixture(scope="module")
def gemma(small_tokenizer):
    m = model()
    params = map_params(lambda w: from_bfloat16(to_bfloat16(w)), m.params)
    return refgemma.Gemma(m.config, params, small_tokenizer, FLOAT32, frozenset())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    m = model()
    small = {name: 0.01 * w if "lora_B" in name else w for name, w in factors(m).items()}
    return lora.read(write(tmp_path_factory.mktemp("adapter") / "small", m, small, "float32"))


TOKENS = [2, 5, 9, 11, 3, 30, 17]


def test_a_row_for_each_changed_weight(gemma, adapter):
    before = [w.copy() for w in leaves(gemma.params)]
    seen = []
    found = lora.audit(gemma, adapter, progress=lambda *step: seen.append(step))
    assert [row.path for row in found.weights] == [
        "layers.0.attn.q", "layers.1.attn.q", "layers.0.mlp.down", "layers.1.mlp.down",
    ]  # fmt: skip
    assert (found.dtype, found.logits) == ("bfloat16", ())
    assert all(np.array_equal(a, b) for a, b in zip(before, leaves(gemma.params), strict=True))
    total = sum(math.prod(row.shape) for row in found.weights)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert found.total.shape == (total,)
    assert found.total.rank is None
    lost = sum(row.unmoved * math.prod(row.shape) for row in found.weights)
    assert found.total.unmoved == pytest.approx(lost / total, rel=1e-12)  # no change of these is exactly 0
    errors = [row.update_error for row in found.weights]
    assert min(errors) < found.total.update_error < max(errors)
    half = lora.audit(gemma, adapter, 0.5)
    for one, other in zip(half.weights, found.weights, strict=True):
        assert one.relative_norm == pytest.approx(other.relative_norm / 2, rel=1e-9)
        assert one.unmoved > other.unmoved


def leaves(params):
    found = []
    map_params(lambda w: found.append(w) or w, params)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_change_of_logits(gemma, adapter, dtype):
    attached = gemma.with_lora(adapter)
    found = audit_attached(gemma, attached, dtype, TOKENS)
    narrow = [] if dtype == "float32" else [f"merged in {dtype}"]
    assert [change.model for change in found.logits] == ["base", "merged in float32", *narrow]
    want = attached.logits(TOKENS).astype(np.float64)
    models = {"base": gemma, "merged in float32": gemma.merge_lora(adapter)}
    for change in found.logits:
        assert change.positions == len(TOKENS)
        if change.model in models:
            logits = models[change.model].logits(TOKENS).astype(np.float64)
            kl = [kl_by_hand(p, q) for p, q in zip(want, logits, strict=True)]
            # The logits are the same; a divergence is a sum of V terms of size 1 that cancel.
            assert change.mean_kl == pytest.approx(np.mean(kl), rel=1e-6, abs=1e-13)
            assert change.max_abs == pytest.approx(np.abs(logits - want).max(), rel=1e-5)
            assert change.flips == np.sum(logits.argmax(axis=1) != want.argmax(axis=1))
    base, single, *rest = found.logits
    # float32 computes with the same numbers in another order: far from bfloat16, and that from the base.
    assert single.max_abs < 1e-5 * np.abs(want).max()
    for change in rest:
        assert 10 * single.max_abs < change.max_abs < base.max_abs
        assert single.mean_kl < change.mean_kl < base.mean_kl


def kl_by_hand(p_logits, q_logits):
    p, q = (np.exp(x - x.max()) / math.fsum(np.exp(x - x.max())) for x in (p_logits, q_logits))
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_flips_and_divergence_are_seen(gemma, adapter):
    """A change so large that other tokens win."""
    found = lora.audit(gemma, adapter, 200.0, tokens=TOKENS)
    assert found.logits[0].flips > 0
    assert found.logits[0].mean_kl > 0.1
    assert found.logits[1].flips == 0


def test_norms_and_tables_that_were_trained_whole(gemma, tmp_path):
    m = model()
    rng = np.random.default_rng(17)
    tensors = factors(m) | {
        f"{PREFIX}model.norm.weight": m.params["final_norm"] + 0.1,
        f"{PREFIX}lm_head.weight": m.params["head"] + 0.01 * rng.normal(size=m.params["head"].shape),
    }
    whole = lora.read(write(tmp_path / "whole", m, tensors, "float32", modules_to_save=["lm_head", "model.norm"]))
    found = lora.audit(gemma, whole, tokens=TOKENS)
    ranks = {row.path: row.rank for row in found.weights}
    assert (ranks["final_norm"], ranks["head"], ranks["layers.1.attn.q"]) == (None, None, 3)
    assert "embed" not in ranks
    by_path = {row.path: row for row in found.weights}
    assert by_path["final_norm"].shape == (m.config.hidden_size,)
    assert 0 < by_path["final_norm"].update_error < 0.1
    assert found.logits[1].max_abs < 1e-4 < found.logits[2].max_abs


def test_refusals(gemma, adapter):
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.q has an adapter already: audit the model without it"):
        lora.audit(gemma.with_lora(adapter), adapter)
    with pytest.raises(ValueError, match=r"dtype is 'int8': expected bfloat16, float16, float32"):
        lora.audit(gemma, adapter, dtype="int8")
    with pytest.raises(ValueError, match=r"tokens have shape \(1, 7\): expected \(T,\), one prompt"):
        lora.audit(gemma, adapter, tokens=[TOKENS])
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.q: row \d+, column \d+ becomes .* too large for float16"):
        lora.audit(gemma, adapter, 1e9, "float16")
    some = gemma.with_lora(adapter, rows=[True, False])
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.q: the adapter is for some rows of a batch only"):
        audit_attached(gemma, some)


# ---- pictures


@pytest.mark.parametrize(("form", "sign"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures(gemma, adapter, form, sign):
    pytest.importorskip("matplotlib")
    assert picture(lora.audit(gemma, adapter), format=form).startswith(sign)


def test_a_picture_says_what_it_shows(gemma, adapter):
    pytest.importorskip("matplotlib")
    from matplotlib import rc_context

    found = lora.audit(gemma, adapter, tokens=TOKENS)
    with rc_context({"svg.fonttype": "none"}):  # text as text
        svg = picture(found, title="small $ on random", format="svg").decode()
    shown = re.findall(r">([^<>]+)</text>", svg)
    rows = {row.path: row for row in found.weights}
    assert {"effective rank", "unmoved by bfloat16", "error of the update", "attn.q", "mlp.down", "0", "1"} <= set(
        shown
    )
    for row in rows.values():
        assert f"{100 * row.unmoved:.0f}%" in shown
        assert f"{row.update_error:.2f}" in shown
        assert f"{row.effective_rank:.1f}" in shown
    heading = " ".join(shown)
    assert f"small $ on random: merged in bfloat16, {100 * found.total.unmoved:.3g} %" in heading
    assert "merged in float32: logits differ by up to" in heading


def test_pictures_of_awkward_audits(gemma, adapter, tmp_path):
    """Only weights outside of the layers; nothing trained; nothing at all."""
    pytest.importorskip("matplotlib")
    found = lora.audit(gemma, adapter)
    outside = tuple(replace(row, path=path) for row, path in zip(found.weights, ("embed", "head"), strict=False))
    assert picture(replace(found, weights=outside))
    untrained = lora.audit(gemma, lora.read(write(tmp_path / "zero", model(), zeros(), "float32")))
    assert picture(untrained)
    with pytest.raises(ValueError, match="the adapter changes no weight: there is nothing to draw"):
        picture(replace(found, weights=()))
    with pytest.raises(ValueError, match=r"unknown picture format 'gif': expected png, svg, pdf"):
        picture(found, format="gif")


def zeros():
    return {name: 0 * w if "lora_B" in name else w for name, w in factors(model()).items()}
