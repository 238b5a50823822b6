"""Causes named with their places: known bugs written by hand into some layers of our own float64 run, by its tap.

It is judged as float64, whose bounds are 1e-9 of those of float32. Bugs in transformers are in tests/peers.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from refgemma.model import forward
from refgemma.numerics import FLOAT64
from refgemma.oracle import diagnose
from refgemma.oracle.bugs.catalogue import BUGS, find
from refgemma.oracle.bugs.locations import locations_of, words
from refgemma.oracle.operations import names_of, split_name
from refgemma.oracle.traces.trace import Trace
from tests.models import random_model, widened
from tests.oracle.gemmas import gemma_of

MODEL = random_model(2, num_layers=6, num_tokens=8)  # 1 < K < N
FIVE = [i for i in range(6) if i != 3]


def dump(places, model=MODEL):
    """Trace of a run with a function of (value, tensors before it, weight of the norm) at each of these names."""
    seen, real = {}, model.positions >= 0
    visible = real[:, None] & (model.positions[:, None] <= model.positions[:, :, None])  # BTS
    params = widened(model.params)

    def tap(name, value):
        layer, kind = split_name(name)
        prefix = "" if layer is None else f"layers.{layer}."
        inputs = {key.removeprefix(prefix): tensor for key, tensor in seen.items() if key.startswith(prefix)}
        block, _, what = kind.partition(".")
        weight = params["final_norm"] if kind == "final_norm" else None
        if what == "norm":
            weight = params["layers"][layer][block]["norm"]
        if name in places:
            value = places[name](value, inputs, weight)
        seen[name] = np.where(visible[:, None], value, 0) if name.endswith(("scores", "probs")) else value.copy()
        return value

    forward(params, model.config, model.tokens, positions=model.positions, numerics=FLOAT64, tap=tap)
    return Trace(seen, dict.fromkeys(seen, "float64"), model.tokens, model.positions, model.config)


def erf(value, inputs, weight):
    gate = inputs["mlp.gate"]
    return gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))


def silu(value, inputs, weight):
    return inputs["mlp.gate"] / (1 + np.exp(-inputs["mlp.gate"]))


def gain_w(value, inputs, weight):
    return value / (1 + weight) * weight


def gain_2_plus_w(value, inputs, weight):
    return value / (1 + weight) * (2 + weight)


def neighbours(name):
    def turned(value, inputs, weight):
        x, H = inputs[name], value.shape[-1]
        angle = np.maximum(MODEL.positions, 0)[:, :, None, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)  # BT1(H/2)
        even, odd = x[..., 0::2], x[..., 1::2]
        both = even * np.cos(angle) - odd * np.sin(angle), odd * np.cos(angle) + even * np.sin(angle)
        return np.stack(both, axis=-1).reshape(x.shape)

    return turned


def scaled(value, inputs, weight):
    return value * 1.001


def rope_in(*layers):
    return {f"layers.{i}.attn.{x}_rope": neighbours(f"attn.{x}") for i in layers for x in "qk"}


def act_in(change, *layers):
    return {f"layers.{i}.mlp.act": change for i in layers}


TWO_W = "norm gain 2 + w (B2), in attn.norm of layers 0 to 5 only"
KEYS = "rotary lanes paired as neighbours (D7), in attn.k_rope of layer 2 only"
CASES = [
    (act_in(erf, 3), "GELU by erf (C1), in layer 3 only"),
    (act_in(erf, *FIVE), "GELU by erf (C1), in layers 0 to 2, 4, 5 only"),
    (rope_in(1, 3, 5), "rotary lanes paired as neighbours (D7), in layers 1, 3, 5 only"),
    ({"final_norm": gain_w}, "norm gain w (B1), in the final norm only"),
    ({f"layers.{i}.attn.norm": gain_2_plus_w for i in range(6)}, TWO_W),
    ({"layers.2.attn.k_rope": neighbours("attn.k")}, KEYS),
]  # fmt: skip


@pytest.mark.parametrize(("places", "said"), CASES, ids=[said for _, said in CASES])
def test_a_bug_in_some_places_is_named_with_them(places, said):
    found = diagnose(dump(places), gemma_of(MODEL))
    assert found.verdict == said
    assert set(found.first.only[0]) == set(places)
    assert not found.tied
    told = found.as_dict()["first"]
    assert told["name"] == said
    assert told["only"] == [list(found.first.only[0])]
    assert said.endswith(told["variants"][0]["place"])
    assert found.first.bugs[0].thread in found.text()


def test_a_bug_in_all_places_has_none():
    whole = act_in(erf, *range(6))
    found = diagnose(dump(whole), gemma_of(MODEL))
    assert found.verdict == "GELU by erf (C1)"
    assert found.as_dict()["first"]["variants"][0]["place"] == "everywhere"
    assert found.first.places == ("",)
    found = diagnose(dump(whole | rope_in(*range(6))), gemma_of(MODEL))
    assert (set(found.first.keys), found.first.places) == ({"C1", "D7"}, ("", ""))


@pytest.mark.parametrize(
    ("places", "named"),
    [
        (act_in(erf, 1) | act_in(silu, 4), {("C1", "in layer 1 only"), ("C2", "in layer 4 only")}),
        (act_in(erf, *FIVE) | act_in(silu, 3), {("C1", "in layers 0 to 2, 4, 5 only"), ("C2", "in layer 3 only")}),
        (act_in(erf, *range(6)) | {"final_norm": gain_w}, {("C1", ""), ("B1", "in the final norm only")}),
        (act_in(erf, 2) | rope_in(2), {("C1", "in layer 2 only"), ("D7", "in layer 2 only")}),
        ({"layers.0.mlp.norm": gain_w, "final_norm": gain_2_plus_w},
         {("B1", "in mlp.norm of layer 0 only"), ("B2", "in the final norm only")}),
    ],
)  # fmt: skip
def test_two_bugs_in_different_places_are_both_named(places, named):
    trace = dump(places)
    found = diagnose(trace, gemma_of(MODEL))
    assert set(zip(found.first.keys, found.first.places, strict=True)) == named
    assert not found.tied
    assert "no known bug explains it alone" in diagnose(trace, gemma_of(MODEL), pairs=False).text()


@pytest.mark.parametrize("name", ["layers.1.mlp.act", "layers.1.mlp.norm", "layers.4.attn.scores", "layers.1.out"])
def test_an_unknown_bug_in_one_layer_stays_unknown(name):
    found = diagnose(dump({name: scaled}), gemma_of(MODEL))
    assert found.verdict == "no known bug explains it, alone or with another"
    assert found.honest.left == (name,)
    assert "would leave" not in found.text()
    known = diagnose(dump({name: scaled} | act_in(erf, 3)), gemma_of(MODEL))  # and hides behind no known one
    assert known.first is None
    assert set(known.honest.left) == {name, "layers.3.mlp.act"}
    assert f"GELU by erf (C1), in layer 3 only would leave {name}" in known.text()


def test_an_unknown_bug_that_loosened_bounds_contain_stays_unknown():
    """Where squares are rounded to bfloat16 a norm may be off by 0.2 %, and this one is, all along, by half of that."""
    everywhere = {name: scaled for name in names_of(MODEL.config) if split_name(name)[1] in find("B6").where}
    assert diagnose(dump(everywhere), gemma_of(MODEL)).first is None


def test_what_was_not_given_joins_its_places():
    trace = dump(act_in(erf, 3))
    outs = {name: value for name, value in trace.tensors.items() if split_name(name)[1] in ("embed", "out", "logits")}
    found = diagnose(replace(trace, tensors=outs), gemma_of(MODEL))
    assert found.verdict == "GELU by erf (C1), in layer 3 only"
    del outs["layers.2.out"]  # what layers 2 and 3 do is seen together, and one of them alone is not tried
    joined = diagnose(replace(trace, tensors=outs), gemma_of(MODEL))
    assert joined.first is None or joined.first.keys != ("C1",)
    logits = diagnose(replace(trace, tensors={"logits": trace.tensors["logits"]}), gemma_of(MODEL))
    assert logits.first is None
    assert "a bug in some layers only is found in a trace of what each layer computes, not in logits" in logits.text()


def test_places_where_a_bug_shows_nothing_are_told():
    """A gate that is zero all along is zero behind any activation."""
    quiet = {f"layers.{i}.mlp.gate": lambda value, *_: np.zeros_like(value) for i in (2,)}
    trace = dump(quiet | act_in(erf, 3))
    weights = MODEL.params["layers"][2]["mlp"]
    params = MODEL.params | {"layers": [*MODEL.params["layers"]]}
    params["layers"][2] = params["layers"][2] | {"mlp": weights | {"gate": np.zeros_like(weights["gate"])}}
    found = diagnose(trace, gemma_of(replace(MODEL, params=params)))
    assert found.verdict == "GELU by erf (C1), in layer 3 only"
    assert found.first.undecided == (("layers.2.mlp.act",),)
    assert "C1 would not show in layers.2.mlp.act: it may be there as well" in found.text()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.key)
def test_sites_hold_every_tensor_once(bug):
    every = names_of(MODEL.config)
    moved = [name for name in every if split_name(name)[1] in bug.where]
    locations = locations_of(bug, MODEL.config, every)
    assert sorted(name for location in locations for name in location.names) == sorted(moved)
    assert all(
        set(location.names) == location.seen for location in locations
    )  # all is given, so all is seen where it is
    whole = locations_of(bug, MODEL.config, ["logits"])
    assert [set(location.names) for location in whole] == ([set(moved)] if moved else [])
    assert locations_of(bug, MODEL.config, []) == []


def test_sites_end_where_tensors_are_given():
    given = ["embed", *(f"layers.{i}.out" for i in range(6)), "layers.4.mlp.norm", "logits"]
    locations = locations_of(find("B1"), MODEL.config, given)
    seen = {frozenset(location.names): location.seen for location in locations}
    assert seen[frozenset({"layers.4.mlp.norm", "layers.4.attn.norm"})] == {"layers.4.mlp.norm", "layers.4.out"}
    assert seen[frozenset({"layers.2.mlp.norm", "layers.2.attn.norm"})] == {"layers.2.out"}
    assert seen[frozenset({"final_norm"})] == {"logits"}


def test_places_in_words():
    norms = find("B1").where
    assert words(["layers.0.mlp.act"], ["mlp.act"]) == "in layer 0 only"
    assert words([f"layers.{i}.mlp.act" for i in (0, 1, 4, 5, 6, 9)], ["mlp.act"]) == "in layers 0, 1, 4 to 6, 9 only"
    assert (
        words(["layers.0.attn.norm", "layers.0.mlp.norm", "final_norm"], norms) == "in layer 0 and the final norm only"
    )
    assert (
        words(["layers.0.attn.norm", "layers.1.mlp.norm"], norms)
        == "in attn.norm of layer 0 and mlp.norm of layer 1 only"
    )
