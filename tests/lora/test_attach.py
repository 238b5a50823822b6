"""Attached adapters against the changed weights written out by hand, and the arrays that stay shared."""

import numpy as np
import pytest

import refgemma
from refgemma import lora
from refgemma.cache import KVCache
from refgemma.config import Config
from refgemma.lora.attach import attach
from refgemma.lora.fit import LowRank, Replaced, ReplacedRows
from refgemma.model import forward
from refgemma.numerics import FLOAT64
from refgemma.ops.linear import Adapted
from tests.lora.folders import factors, model, write
from tests.models import map_params

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
    changes = lora.fit(lora.read(write(tmp_path, m)), m.config).changes
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


@pytest.fixture(scope="module")
def tiny():
    return refgemma.load("tiny-it", weights="bfloat16")


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


def test_load_puts_adapters_on(tiny, adapter):
    tokens = tiny.encode_prompt("What is 2 + 3?")
    loaded = refgemma.load("tiny-it", weights="bfloat16", lora=[f"{adapter.folder}:0.5"])
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
    assert lora.split_scale(text) == parts
