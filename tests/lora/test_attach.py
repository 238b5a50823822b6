"""Attached adapters against the changed weights written out by hand, and the arrays that stay shared."""

import functools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

import refgemma
from refgemma import lora
from refgemma.cache import KVCache
from refgemma.config import Config
from refgemma.lora.adapter import split_scale
from refgemma.lora.attach import attach, narrowed
from refgemma.lora.fit import LowRank, Replaced, ReplacedRows, fit
from refgemma.lora.tiles import rounded
from refgemma.model import forward
from refgemma.numerics import FLOAT64, from_bfloat16, to_bfloat16
from refgemma.ops.linear import Adapted
from tests.lora.folders import PREFIX, factors, model, write
from tests.models import map_params

OPERATIONS = ("forward",)
pytestmark = pytest.mark.usefixtures("on_each_library")

# Two ways to the same logits in float64: a few thousand roundings of 1.1e-16 each, of numbers up to the logit scale.
CLOSE = 1e-12


def in_float64(params):
    return map_params(lambda w: w.astype(np.float64), params)


def logits(params, m, config: Config | None = None, **options):
    return forward(params, config or m.config, m.tokens, positions=m.positions, numerics=FLOAT64, **options)


def close(a, b):
    return np.abs(a - b).max() <= CLOSE * np.abs(b).max()


def by_hand(params, path, change):
    """A copy of the parameters with one weight changed by `change`."""
    tree = map_params(np.copy, params)
    *parents, last = path.split(".")
    node = tree
    for part in parents:
        node = node[int(part) if part.isdigit() else part]
    if path in ("embed", "head"):  # tied in the base: the copy is two tables from here on
        tree["embed"], tree["head"] = params["embed"].copy(), params["head"].copy()
    node[last] = change(node[last])
    return tree


def low_rank(m, path, *, rank=3, magnitude=False, bias=False, seed=0):
    rng = np.random.default_rng(seed)
    *parents, last = path.split(".")
    node = m.params
    for part in parents:
        node = node[int(part) if part.isdigit() else part]
    O, I = node[last].shape
    norms = rng.uniform(0.5, 2.0, size=I if path == "embed" else O) if magnitude else None
    return LowRank(path, rng.normal(size=(rank, I)) * I**-0.5, rng.normal(size=(O, rank)), 0.7, norms,
                   rng.normal(size=O) if bias else None)  # fmt: skip


@pytest.mark.parametrize("path", ["layers.0.attn.q", "layers.1.attn.out", "layers.1.mlp.down", "embed", "head"])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_low_rank_change_is_w_plus_scale_b_a(path, scale):
    m = model()
    params = in_float64(m.params)
    change = low_rank(m, path)
    got = logits(attach(params, [change], scale=scale, dtype=np.float64), m)

    def hand(factor):
        return logits(by_hand(params, path, lambda w: w + factor * change.up @ change.down), m)

    assert close(got, hand(0.7 * scale))
    assert not close(got, hand(0.7 * scale * 1.001))
    assert not close(got, hand(0.0 if scale == 1 else 0.7))


def test_a_change_of_the_embedding_is_scaled_with_it_and_leaves_the_tied_head_alone():
    """Adapters on the embedding come before sqrt(D); unscaled they are almost nothing (peft, pull request 2825)."""
    m = model()
    params = in_float64(m.params)
    change = low_rank(m, "embed")
    got = logits(attach(params, [change], dtype=np.float64), m)
    delta = 0.7 * change.up @ change.down
    D = m.config.hidden_size
    assert close(got, logits(by_hand(params, "embed", lambda w: w + delta), m))
    assert not close(got, logits(by_hand(params, "embed", lambda w: w + delta / np.sqrt(D)), m))  # the delta unscaled
    leaked = {**params, "embed": params["embed"] + delta, "head": params["embed"] + delta}
    assert not close(got, logits(leaked, m))


@pytest.mark.parametrize("path", ["layers.0.attn.q", "layers.1.mlp.down", "embed"])
def test_dora_brings_rows_to_the_trained_norms(path):
    m = model()
    params = in_float64(m.params)
    change = low_rank(m, path, magnitude=True)
    axis = 0 if path == "embed" else 1

    def dora(w, axis=axis):
        v = w + 0.7 * change.up @ change.down
        norm = np.sqrt((v**2).sum(axis=axis, keepdims=True))
        return v / norm * (change.magnitude if axis == 0 else change.magnitude[:, None])

    got = logits(attach(params, [change], dtype=np.float64), m)
    assert close(got, logits(by_hand(params, path, dora), m))

    def of_the_base(w):  # the norm of W, not of W + scale B A
        v = w + 0.7 * change.up @ change.down
        return dora(w) * np.sqrt((v**2).sum(axis, keepdims=True) / (w**2).sum(axis, keepdims=True))

    assert not close(got, logits(by_hand(params, path, of_the_base), m))
    assert not close(
        got, logits(by_hand(params, path, lambda w: w + 0.7 * change.up @ change.down), m)
    )  # magnitude ignored


def test_the_bias_of_the_second_factor_is_scaled_with_it():
    m = model()
    params = in_float64(m.params)
    change = low_rank(m, "layers.0.attn.q", bias=True)
    seen = {}
    attached = attach(params, [change], dtype=np.float64)
    logits(attached, m, tap=lambda name, value: seen.setdefault(name, value))
    x, q = seen["layers.0.attn.norm"], seen["layers.0.attn.q"]
    w = params["layers"][0]["attn"]["q"]
    wanted = x @ w.T + 0.7 * (x @ change.down.T @ change.up.T + change.bias)
    assert close(q.reshape(wanted.shape), wanted)
    assert not close(q.reshape(wanted.shape), wanted + 0.3 * change.bias)  # the bias unscaled


@pytest.mark.parametrize("path", ["embed", "head"])
def test_trained_rows_take_the_place_of_the_old(path):
    m = model()
    params = in_float64(m.params)
    ids = tuple(sorted({int(m.tokens[m.real][0]), 7}))
    rows = np.random.default_rng(1).normal(size=(len(ids), m.config.hidden_size))

    def put(w, rows=rows):
        w[list(ids)] = rows
        return w

    got = logits(attach(params, [ReplacedRows(path, ids, rows)], dtype=np.float64), m)
    assert close(got, logits(by_hand(params, path, put), m))
    assert not close(
        got, logits(by_hand(params, path, lambda w: put(w, w[list(ids)] + rows)), m)
    )  # rows as differences


def test_whole_weights_take_the_place_of_the_old():
    m = model()
    params = in_float64(m.params)
    new = 1.5 * params["layers"][1]["attn"]["norm"] + 0.1
    got = logits(attach(params, [Replaced("layers.1.attn.norm", new)], dtype=np.float64), m)
    assert close(got, logits(by_hand(params, "layers.1.attn.norm", lambda w: new), m))


def test_a_stored_table_that_did_not_change_is_not_kept():
    m = model()
    tree = attach(m.params, [Replaced("embed", m.params["embed"].copy())])
    assert tree["embed"] is m.params["embed"]


def test_several_adapters_are_summed_each_against_the_base():
    m = model()
    params = in_float64(m.params)
    one, two = low_rank(m, "layers.0.attn.q", seed=1), low_rank(m, "layers.0.attn.q", rank=2, seed=2)
    tree = attach(attach(params, [one], dtype=np.float64), [two], scale=-0.25, dtype=np.float64)
    delta = 0.7 * one.up @ one.down - 0.25 * 0.7 * two.up @ two.down
    assert close(logits(tree, m), logits(by_hand(params, "layers.0.attn.q", lambda w: w + delta), m))


def test_two_dora_adapters_do_not_see_each_other():
    """Merged in turn, the second would take the norms of the first's rows: https://github.com/huggingface/peft/issues/3608."""
    m = model()
    params = in_float64(m.params)
    one, two = (low_rank(m, "layers.0.attn.q", magnitude=True, seed=seed) for seed in (1, 2))

    def changed(w, change):
        v = w + 0.7 * change.up @ change.down
        return v / np.sqrt((v**2).sum(1, keepdims=True)) * change.magnitude[:, None]

    got = logits(attach(attach(params, [one], dtype=np.float64), [two], dtype=np.float64), m)
    side_by_side = by_hand(params, "layers.0.attn.q", lambda w: changed(w, one) + changed(w, two) - w)
    in_turn = by_hand(params, "layers.0.attn.q", lambda w: changed(changed(w, one), two))
    assert close(got, logits(side_by_side, m))
    assert not close(got, logits(in_turn, m))


def test_rows_of_a_batch_get_their_own_adapters_and_the_cache_keeps_them_apart():
    m = model()
    params = in_float64(m.params)
    change = low_rank(m, "layers.0.attn.v")
    B, T = m.tokens.shape
    some = np.arange(B) % 2 == 0
    tree = attach(params, [change], rows=some, dtype=np.float64)
    whole, base = attach(params, [change], dtype=np.float64), params
    cache = KVCache(m.config, batch=B, capacity=T, dtype=np.float64)
    halves = [
        forward(tree, m.config, m.tokens[:, part], positions=m.positions[:, part], cache=cache, numerics=FLOAT64)
        for part in (slice(0, T // 2), slice(T // 2, T))
    ]
    got = np.concatenate(halves, axis=1)
    wanted = np.where(some[:, None, None], logits(whole, m), logits(base, m))
    assert close(got, wanted)
    with pytest.raises(ValueError, match=f"for rows of a batch of {B}, the batch has 1"):
        forward(tree, m.config, m.tokens[:1], positions=m.positions[:1], numerics=FLOAT64)


def test_the_base_is_shared_and_untouched(tmp_path):
    m = model()
    changes = fit(lora.read(write(tmp_path, m)), m.config).changes
    before = map_params(np.copy, m.params)
    tree = attach(m.params, changes)
    for i, (layer, base) in enumerate(zip(tree["layers"], m.params["layers"], strict=True)):
        assert isinstance(layer["attn"]["q"], Adapted)
        assert layer["attn"]["q"].base is base["attn"]["q"]
        assert layer["attn"]["k"] is base["attn"]["k"]
        assert np.array_equal(base["attn"]["q"], before["layers"][i]["attn"]["q"])
    assert tree["embed"] is tree["head"] is m.params["embed"]


@pytest.mark.parametrize("change", [Replaced("final_norm", np.ones(1)), ReplacedRows("embed", (1,), np.ones((1, 1)))])
def test_what_was_trained_whole_cannot_be_scaled(change):
    with pytest.raises(ValueError, match=r"is to be scaled by 0.5, but it holds .* trained whole: use scale 1"):
        attach(model().params, [change], scale=0.5)


def test_what_was_trained_whole_cannot_be_for_some_rows_or_beside_another():
    m = model()
    new = Replaced("layers.0.attn.q", m.params["layers"][0]["attn"]["q"] + 1)
    with pytest.raises(ValueError, match=r"for some rows of the batch, but it holds layers.0.attn.q trained whole"):
        attach(m.params, [new], rows=np.array([True]))
    with pytest.raises(ValueError, match="trained whole, and another adapter changes it"):
        attach(attach(m.params, [low_rank(m, "layers.0.attn.q")]), [new])


@functools.cache
def tiny_on(device, xp):
    return refgemma.load("tiny-it", weights="bfloat16", device=device)


def test_two_adapters_with_the_same_weight_trained_whole_are_refused():
    """Either order, and beside factors as well: one of them would be silently ignored."""
    m = model()
    path = "layers.0.attn.q"
    one, two = (Replaced(path, m.params["layers"][0]["attn"]["q"] + k) for k in (1, 2))
    for second in (two, low_rank(m, path)):
        with pytest.raises(ValueError, match=f"{path} was trained whole, and another adapter changes it"):
            attach(attach(m.params, [one]), [second], before=m.params)
    with pytest.raises(ValueError, match=f"{path} was trained whole, and another adapter changes it"):
        attach(attach(m.params, [low_rank(m, path)]), [one], before=m.params)
    both = attach(m.params, [one, low_rank(m, path)])["layers"][0]["attn"]["q"]  # of one adapter, they belong together
    assert both.base is one.weight
    untouched = Replaced(path, m.params["layers"][0]["attn"]["q"].copy())
    attached = attach(m.params, [one])
    assert attach(attached, [untouched], before=m.params)["layers"][0]["attn"]["q"] is one.weight


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 10**400, "1", None, 1j])
def test_a_scale_is_a_finite_number(scale):
    m = model()
    with pytest.raises(ValueError, match=r"scale is .*: expected a finite number") as error:
        attach(m.params, [low_rank(m, "layers.0.attn.q")], scale=scale)
    assert len(str(error.value)) < 100


@pytest.mark.parametrize(("dtype", "largest"), [(np.float32, 1e38), (np.float64, 1e307)])
def test_a_product_scaled_out_of_its_format_is_refused(dtype, largest):
    """As by lora_alpha = 1e308, which is finite: the logits would be NaN."""
    m = model()
    change = low_rank(m, "layers.0.attn.q")
    attach(m.params, [change], scale=largest, dtype=dtype)
    with pytest.raises(ValueError, match=r"the change of layers.0.attn.q is scaled by .*: no number of float"):
        attach(m.params, [replace(change, scale=largest)], scale=-100.0, dtype=dtype)


@pytest.mark.parametrize("scale", [np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2)])
def test_any_kind_of_number_is_a_scale(scale):
    m = model()
    change = low_rank(m, "layers.0.attn.q")
    (delta,) = attach(m.params, [change], scale=scale)["layers"][0]["attn"]["q"].deltas
    assert delta.scale == change.scale * 0.5
    assert type(delta.scale) is float  # a NumPy scalar would decide dtypes


@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_dora_norms_are_those_of_the_scaled_change(scale):
    m = model()
    params = in_float64(m.params)
    change = low_rank(m, "layers.0.attn.q", magnitude=True)

    def dora(w, of_norm):
        v = w + 0.7 * change.up @ change.down * scale
        n = w + 0.7 * change.up @ change.down * of_norm
        return v / np.sqrt((n**2).sum(1, keepdims=True)) * change.magnitude[:, None]

    got = logits(attach(params, [change], scale=scale, dtype=np.float64), m)
    assert close(got, logits(by_hand(params, "layers.0.attn.q", lambda w: dora(w, scale)), m))
    assert not close(got, logits(by_hand(params, "layers.0.attn.q", lambda w: dora(w, 1.0)), m))


def test_weights_trained_whole_are_narrow_where_an_engine_is():
    """In bfloat16 an engine rounds them as it loads them; tests/peers/test_bf16_peft.py holds that against PEFT."""
    m = model()
    q, D = m.params["layers"][0]["attn"]["q"], m.config.hidden_size
    rng = np.random.default_rng(8)
    rows = rng.normal(size=(2, D)).astype(np.float32)
    base = map_params(lambda w: from_bfloat16(to_bfloat16(w)), m.params)
    changes = [
        Replaced("layers.0.attn.q", q + 0.1),
        Replaced("final_norm", rng.normal(size=D)),
        ReplacedRows("head", (4, 1), rows),
        low_rank(m, "layers.0.attn.k"),
    ]
    narrow = narrowed(changes, base)
    assert np.array_equal(narrow[0].weight.bits, rounded((q + 0.1).astype(np.float64), "bfloat16"))
    assert np.array_equal(to_bfloat16(narrow[1].weight), rounded(changes[1].weight, "bfloat16"))
    table = from_bfloat16(narrow[2].weight.bits)
    assert np.array_equal(table[[4, 1]], from_bfloat16(to_bfloat16(rows)))
    others = np.delete(np.arange(len(table)), [1, 4])
    assert np.array_equal(table[others], base["head"][others])
    assert narrow[3] is changes[3]
    (some,) = narrowed([changes[2]], base, np.array([True, False]))
    assert isinstance(some, ReplacedRows)  # a table is for every row of a batch
    assert np.array_equal(some.rows, from_bfloat16(to_bfloat16(rows)))
    assert narrowed(narrow, base)[0] is narrow[0]


@pytest.fixture
def tiny(device, xp):
    return tiny_on(device, xp)


@pytest.fixture
def adapter(tiny, tmp_path):
    class Shape:
        config = tiny.config

    return lora.read(write(tmp_path / "loud", Shape, {n: 1.5 * t for n, t in factors(Shape).items()}, dtype="float32"))


def test_a_gemma_with_an_adapter_answers_otherwise_and_leaves_the_base_alone(tiny, adapter):
    tokens = tiny.encode_prompt("What is 2 + 3?")
    before = tiny.logits(tokens)
    adapted = tiny.with_lora(adapter, scale=0.5)
    assert repr(adapted).endswith("with loud x 0.5")
    assert np.abs(adapted.logits(tokens) - before).max() > 0.1
    assert np.array_equal(tiny.logits(tokens), before)
    assert adapted.params["layers"][0]["attn"]["q"].base is tiny.params["layers"][0]["attn"]["q"]


def test_rows_of_a_generated_batch_come_out_as_alone(tiny, adapter):
    prompts = ["What is 2 + 3?", "Spell cat.", "What is 2 + 3?"]
    settings = {"temperature": 0.0, "max_tokens": 12}
    together = tiny.generate_batch(prompts, lora=[adapter, None, None], **settings)
    alone = [
        tiny.with_lora(adapter).generate(prompts[0], **settings),
        *(tiny.generate(p, **settings) for p in prompts[1:]),
    ]
    assert [out.text for out in together] == [out.text for out in alone]
    assert together[0].text != together[2].text
    with pytest.raises(ValueError, match="lora has 1 entries for 3 prompts"):
        tiny.generate_batch(prompts, lora=[adapter])


@pytest.fixture
def other(tiny, tmp_path):
    class Shape:
        config = tiny.config

    return lora.read(write(tmp_path / "other", Shape, {n: 1.5 * t for n, t in factors(Shape, seed=1).items()}))


def test_each_row_of_a_generated_batch_may_have_its_own_adapter(tiny, adapter, other):
    prompt = "What is 2 + 3?"
    settings = {"temperature": 0.0, "max_tokens": 12}
    together = tiny.generate_batch([prompt] * 4, lora=[adapter, None, other, adapter], **settings)
    alone = [g.generate(prompt, **settings) for g in (tiny.with_lora(adapter), tiny, tiny.with_lora(other))]
    assert [out.tokens for out in together] == [alone[i].tokens for i in (0, 1, 2, 0)]
    assert len({tuple(out.tokens) for out in alone}) == 3


def test_unmerging_goes_back_one_merge(tiny, adapter, other):
    """What was merged before stays, and is the very model that it was."""
    merged = tiny.merge_lora(adapter)
    again = merged.with_lora(other).merge_lora()
    assert again.unmerge_lora() is merged
    assert again.unmerge_lora().unmerge_lora() is tiny
    tokens = [2, 5, 9]
    assert not np.array_equal(again.logits(tokens), merged.logits(tokens))


def test_a_merge_takes_factors_as_they_are_stored(tiny, other):
    """In float64, though the activations are float32, and attached factors with them."""
    tiny = refgemma.load("tiny-it", numerics="float32", weights="float32")
    merged = tiny.merge_lora(other).params["layers"][0]["attn"]["q"]
    a, b = (other.modules["model.layers.0.self_attn.q_proj"][part] for part in ("lora_A", "lora_B"))
    w = tiny.params["layers"][0]["attn"]["q"].astype(np.float64)
    # Half a unit of float32 and what is left of a dozen roundings in float64; factors in float32 are off by more.
    want = w + 2.0 * b @ a
    size = np.abs(w) + 2.0 * np.abs(b) @ np.abs(a)
    assert np.all(np.abs(merged - want) <= 2.0**-24 * np.abs(want) + 12 * 2.0**-53 * size)
    rough = w + 2.0 * b.astype(np.float32).astype(np.float64) @ a.astype(np.float32)
    assert np.any(np.abs(rough.astype(np.float32) - want) > 2.0**-24 * np.abs(want) + 12 * 2.0**-53 * size)


@pytest.mark.parametrize("given", ["pirate", None, {"r": 4}])
def test_what_is_no_adapter_is_one_sentence(tiny, given):
    with pytest.raises(TypeError, match=f"adapter is a {type(given).__name__}: expected an Adapter"):
        tiny.with_lora(given)


def test_a_name_in_a_batch_is_one_sentence(tiny):
    with pytest.raises(TypeError, match="adapter is a str: expected an Adapter"):
        tiny.generate_batch(["a", "b"], lora=["pirate", None])


def test_load_puts_adapters_on(tiny, adapter, device):
    tokens = tiny.encode_prompt("What is 2 + 3?")
    loaded = refgemma.load("tiny-it", weights="bfloat16", lora=[f"{adapter.folder}:0.5"], device=device)
    assert np.array_equal(loaded.logits(tokens), tiny.with_lora(adapter, 0.5).logits(tokens))
    with pytest.raises(
        FileNotFoundError, match=r"no adapter 'no-such': expected a folder that holds adapter_config.json"
    ):
        refgemma.load("tiny-it", lora="no-such")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scale": float("inf")}, "scale is inf: expected a finite number"),
        ({"scale": "1"}, "scale is '1': expected a finite number"),
        ({"rows": [0, 1]}, "rows are int64 of shape .2,.: expected a list of true and false"),
    ],
)
def test_bad_settings_are_one_sentence(tiny, adapter, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny.with_lora(adapter, **options)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a/b", ("a/b", 1.0)),
        ("a/b:0.5", ("a/b", 0.5)),
        ("a:-2", ("a", -2.0)),
        (r"C:\loras\pirate", (r"C:\loras\pirate", 1.0)),
        (":3", (":3", 1.0)),
    ],
)
def test_a_scale_stands_behind_a_colon(text, parts):
    assert split_scale(text) == parts


def test_a_profile_in_bfloat16_rounds_what_was_trained_whole(tmp_path):
    """The file is in float32; the arithmetic of float32 takes it as it is."""
    narrow, wide = (refgemma.load("tiny-it", numerics=name) for name in ("bf16-transformers", "float32"))
    V, D = narrow.config.vocab_size, narrow.config.hidden_size
    head = np.random.default_rng(9).normal(size=(V, D)).astype(np.float32)
    tensors = factors(narrow) | {f"{PREFIX}lm_head.weight": head}
    adapter = lora.read(write(tmp_path, narrow, tensors, "float32", modules_to_save=["lm_head"]))
    assert np.array_equal(narrow.with_lora(adapter).params["head"].bits, to_bfloat16(head))
    assert np.array_equal(wide.with_lora(adapter).params["head"], head)
