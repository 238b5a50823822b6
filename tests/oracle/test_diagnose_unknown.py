"""Bugs that are no known ones, planted by hand in our own float32 and bfloat16 runs, are never given a known name.

They are written into the tap of a forward pass without any of the oracle's own departures. Many are near a known bug,
and smaller than what that bug's own roundings would excuse.
"""

from dataclasses import replace

import numpy as np
import pytest

from refgemma.model import forward
from refgemma.numerics import FLOAT32, PROFILES, from_bfloat16, to_bfloat16
from refgemma.oracle import diagnose
from refgemma.oracle.formula_models.formula import find
from refgemma.oracle.operations import split_name
from refgemma.oracle.traces.trace import Trace
from tests.models import Model, map_params
from tests.oracle.gemmas import gemma_of
from tests.tiny_it import tiny_it

UNKNOWN = {}


def unknown(*kinds):
    """Entry of `UNKNOWN`: a function of (value, tensors of the layer before it, model) for tensors of these kinds."""

    def entered(change):
        UNKNOWN[change.__name__] = (kinds, change)
        return change

    return entered


NORMS = ("attn.norm", "mlp.norm", "final_norm")
TURNED = ("attn.q_rope", "attn.k_rope")


def turned(x, positions, frequencies, sign=1):
    angle = np.maximum(positions, 0)[:, :, None, None] * frequencies  # BT1(H/2)
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), sign * np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def frequencies(model, base=None):
    H = model.config.layers[0].head_dim
    return (base or model.config.layers[0].rope_theta) ** (-np.arange(0, H, 2) / H)


@unknown(*TURNED)
def rope_base_five_percent_larger(value, before, model):
    return turned(before["turned"], model.positions, frequencies(model, 1.05 * model.config.layers[0].rope_theta))


@unknown(*TURNED)
def rope_base_of_another_model(value, before, model):
    return turned(before["turned"], model.positions, frequencies(model, 1e6))


@unknown(*TURNED)
def rope_the_other_way_round(value, before, model):
    return turned(before["turned"], model.positions, frequencies(model), sign=-1)


@unknown("attn.k_rope")
def keys_not_turned(value, before, model):
    return before["attn.k"]


@unknown(*TURNED)
def rope_table_in_float16(value, before, model):
    angle = np.maximum(model.positions, 0)[:, :, None, None] * frequencies(model)
    first, second = np.split(before["turned"], 2, axis=-1)
    cos, sin = (table.astype(np.float16).astype(np.float64) for table in (np.cos(angle), np.sin(angle)))
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@unknown("attn.probs")
def softmax_in_float16(value, before, model):
    return value.astype(np.float16).astype(value.dtype)


@unknown("attn.scores")
def scores_capped_at_50(value, before, model):
    return 50 * np.tanh(value / 50)


@unknown("attn.scores")
def scores_two_percent_larger(value, before, model):
    return value * 1.02


@unknown("attn.mix")
def heads_in_another_order(value, before, model):
    return value[:, :, ::-1]


@unknown("attn.v")
def values_in_8_bits(value, before, model):
    step = np.maximum(np.abs(value).max(axis=-1, keepdims=True), 1e-30) / 127
    return np.round(value / step) * step


@unknown("mlp.down")
def branch_a_thousandth_too_small(value, before, model):
    return value * 0.999


@unknown(*NORMS)
def mean_square_over_one_less(value, before, model):
    D = model.config.hidden_size
    return value * np.sqrt((D - 1) / D)


@unknown(*NORMS)
def normed_in_float16(value, before, model):
    return value.astype(np.float16).astype(value.dtype)


@unknown(*NORMS)
def three_quarters_narrowed_before_the_gain(value, before, model):
    """Three quarters of a known bug: three times closer to it than to the reference, and inside all of its bounds."""
    gain = 1 + before["weight"]
    narrow = from_bfloat16(to_bfloat16(value / gain)) * from_bfloat16(to_bfloat16(gain))
    return value + 0.75 * (narrow - value)


@unknown(*NORMS)
def norm_of_what_is_centred(value, before, model):
    return value - value.mean(axis=-1, keepdims=True)


@unknown("mlp.act")
def quick_gelu(value, before, model):
    gate = before["mlp.gate"]
    return gate / (1 + np.exp(-1.702 * gate))


@unknown("mlp.act")
def relu(value, before, model):
    return np.maximum(before["mlp.gate"], 0)


@unknown("mlp.gated")
def one_added_to_up(value, before, model):
    return before["mlp.act"] * (before["mlp.up"] + 1)


@unknown("logits")
def logits_capped_at_30(value, before, model):
    return 30 * np.tanh(value / 30)


@unknown("logits")
def bias_on_the_head(value, before, model):
    return value + 0.01


@unknown("embed")
def scale_of_another_width(value, before, model):
    D = model.config.hidden_size
    return value * np.sqrt((D + 8) / D)


def dump(model, kinds, change, dtype="float32"):
    """Trace of a float32 or bfloat16 run with a change of tensors of these kinds."""
    numerics, params = FLOAT32, model.params
    if dtype == "bfloat16":
        numerics = PROFILES["bf16-transformers"]
        params = map_params(lambda w: from_bfloat16(to_bfloat16(w)), params)
    real = model.positions >= 0
    visible = real[:, None] & (model.positions[:, None] <= model.positions[:, :, None])  # BTS
    seen, layer = {}, {}

    def tap(name, value):
        kind = split_name(name)[1]
        if kind in kinds:
            before = layer | {"weight": weight_of(name, params), "turned": layer.get(kind.removesuffix("_rope"))}
            value = change(value, before, model).astype(np.float32)
            if dtype == "bfloat16":
                value = from_bfloat16(to_bfloat16(value))
        if kind == "attn.norm":
            layer.clear()
        layer[kind] = value
        seen[name] = np.where(visible[:, None], value, 0) if kind in ("attn.scores", "attn.probs") else value.copy()
        return value

    forward(params, model.config, model.tokens, positions=model.positions, numerics=numerics, tap=tap)
    return Trace(seen, dict.fromkeys(seen, dtype), model.tokens, model.positions, model.config)


def weight_of(name, params):
    """Of a norm."""
    layer, kind = split_name(name)
    if kind == "final_norm":
        return params["final_norm"]
    block, _, what = kind.partition(".")
    return params["layers"][layer][block]["norm"] if what == "norm" else None


def logits_of(trace):
    return replace(trace, tensors={"logits": trace.tensors["logits"]})


def model_of(name):
    """A formula model, or the shipped one on a text and a padded row."""
    if name != "tiny-it":
        return find(name)
    gemma, T = tiny_it(), 9
    tokens = np.random.default_rng(3).integers(110, 1000, size=(2, T))
    tokens[0, 0] = tokens[1, 3] = 2
    positions = np.array([np.arange(T), [-1] * 3 + list(range(T - 3))])
    return Model(0, gemma.config, gemma.params, tokens, positions)


# On a model of six layers, which takes longer, those that once were given a name.
CASES = [(name, bug) for name in ("reveal-gqa", "reveal-mqa") for bug in UNKNOWN] + [
    ("tiny-it", bug)
    for bug in (
        "rope_base_five_percent_larger",
        "softmax_in_float16",
        "scores_capped_at_50",
        "branch_a_thousandth_too_small",
        "mean_square_over_one_less",
        "three_quarters_narrowed_before_the_gain",
        "quick_gelu",
    )
]


@pytest.mark.parametrize(("name", "bug"), CASES)
def test_an_unknown_bug_is_given_no_known_name(name, bug):
    model = model_of(name)
    trace = dump(model, *UNKNOWN[bug])
    for part in (trace, logits_of(trace)):
        found = diagnose(part, gemma_of(model), arithmetic="float32")
        assert found.verdict == "no known bug explains it, alone or with another"


@pytest.mark.parametrize("bug", UNKNOWN)
def test_an_unknown_bug_of_a_narrow_run_is_given_no_known_name(bug):
    """What is inside rounding, as many of them are by their logits, needs no explanation."""
    model = model_of("reveal-gqa")
    trace = dump(model, *UNKNOWN[bug], "bfloat16")
    for part in (trace, logits_of(trace)):
        found = diagnose(part, gemma_of(model), arithmetic="bfloat16")
        assert found.first is None
        assert found.ok != found.needed


@pytest.mark.parametrize(
    ("bug", "kinds"),
    [
        ("values too large", ("final_norm", "logits")),
        ("tokens reversed", ("layers.1.mlp.down", "final_norm", "logits")),
    ],
)
def test_an_unknown_bug_is_given_no_known_name_by_few_tensors(bug, kinds):
    """What stands in for tensors that were not given is so uncertain that two bugs at once would allow for anything."""
    model = find("reveal-gqa")
    if bug == "tokens reversed":
        trace = replace(dump(replace(model, tokens=model.tokens[:, ::-1]), (), None), tokens=model.tokens)
    else:
        trace = dump(model, ("attn.v",), lambda value, before, model: value * 1.1)
    given = {name: value for name, value in trace.tensors.items() if name.endswith(kinds)}
    found = diagnose(replace(trace, tensors=given), gemma_of(model), arithmetic="float32")
    assert found.needed
    assert found.first is None


@pytest.mark.parametrize(("dtype", "off"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_a_known_bug_with_one_number_off_is_not_that_bug(dtype, off):
    """More roundings than a token's largest number may be off by, 64 of float32 or 3 of bfloat16."""
    model = model_of("reveal-gqa")
    changed = []

    def silu(value, before, model):
        value = before["mlp.gate"] / (1 + np.exp(-before["mlp.gate"]))
        if not changed:
            at = np.unravel_index(np.abs(value).argmax(), value.shape)
            value[at] *= 1 + off
            changed.append(at)
        return value

    found = diagnose(dump(model, ("mlp.act",), silu, dtype), gemma_of(model), arithmetic=dtype)
    assert found.first is None
    assert changed
    found = diagnose(dump(model, ("mlp.act",), silu, dtype), gemma_of(model), arithmetic=dtype)  # with none off
    assert found.first.keys == ("C2",)
