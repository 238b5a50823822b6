"""The tap: every named tensor once a layer, with its axes, its true values, and what it returns taken for good."""

from itertools import combinations

import numpy as np
import pytest

from refgemma.cache import KVCache
from refgemma.numerics import FLOAT32, FLOAT64
from tests.judge import FLOAT64_BOUND, error, run
from tests.models import random_model
from tests.truth import truth_row

OPERATIONS = ("run",)
pytestmark = pytest.mark.usefixtures("on_each_library")

LAYER_NAMES = {  # name: axes, in the order of the computation
    "attn.norm": "BTD",
    "attn.q": "BTNH",
    "attn.k": "BTKH",
    "attn.v": "BTKH",
    "attn.q_rope": "BTNH",
    "attn.k_rope": "BTKH",
    "attn.scores": "BNTS",
    "attn.probs": "BNTS",
    "attn.mix": "BTNH",
    "attn.out": "BTD",
    "attn.residual": "BTD",
    "mlp.norm": "BTD",
    "mlp.gate": "BTF",
    "mlp.up": "BTF",
    "mlp.act": "BTF",
    "mlp.gated": "BTF",
    "mlp.down": "BTD",
    "out": "BTD",
}


def axes_of(config):
    """Every name the tap is to be called with, and its axes."""
    names = {"embed": "BTD"}
    for i in range(config.num_layers):
        names |= {f"layers.{i}.{name}": axes for name, axes in LAYER_NAMES.items()}
    return names | {"final_norm": "BTD", "logits": "BTV"}


def record(model, *, numerics, **arguments):
    """Named tensors of a run, as a list of (name, value)."""
    seen = []

    def tap(name, value):
        seen.append((name, value.copy()))
        return value

    run(model, numerics=numerics, tap=tap, **arguments)
    return seen


@pytest.mark.parametrize("numerics", [FLOAT32, FLOAT64], ids=lambda numerics: numerics.name)
@pytest.mark.parametrize("seed", range(6))
def test_every_name_appears_once_with_its_axes_and_dtype(seed, numerics):
    model = random_model(seed, num_tokens=11)
    c, (B, T) = model.config, model.tokens.shape
    seen = record(model, numerics=numerics)
    names = axes_of(c)
    assert sorted(name for name, _ in seen) == sorted(names)
    place = {name: i for i, (name, _) in enumerate(seen)}
    blocks = [f"layers.{i}.{name}" for i in range(c.num_layers) for name in ("attn.norm", "attn.residual", "out")]
    stream = [place[name] for name in ["embed", *blocks, "final_norm", "logits"]]
    assert stream == sorted(stream)  # in the order of the computation
    size = {"B": B, "T": T, "S": T, "D": c.hidden_size, "F": c.layers[0].intermediate_size, "V": c.vocab_size}
    size |= {"N": c.layers[0].num_heads, "K": c.layers[0].num_kv_heads, "H": c.layers[0].head_dim}
    for name, value in seen:
        assert value.shape == tuple(size[axis] for axis in names[name]), name
        assert value.dtype == numerics.dtype, name  # nothing widens or narrows on the way


@pytest.mark.parametrize("seed", range(9))
def test_every_named_tensor_has_its_true_value(seed):
    model = random_model(seed, num_tokens=11)
    truth = [
        truth_row(model.params, model.config, model.tokens[b, real], model.positions[b, real])
        for b, real in enumerate(model.real)
    ]
    for name, value in record(model, numerics=FLOAT64):
        axes = axes_of(model.config)[name]
        for b, real in enumerate(model.real):
            want = truth[b][name]
            got = value[b]
            for axis, letter in enumerate(axes[1:]):
                if letter in "TS":
                    got = np.compress(real, got, axis=axis)
            assert error(got, want) <= FLOAT64_BOUND, name
    for one, other in combinations(truth[0], 2):  # it can fail: a tensor under another's name is seen
        if truth[0][one].shape == truth[0][other].shape:
            assert error(truth[0][one], truth[0][other]) > 1000 * FLOAT64_BOUND, (one, other)


def test_scores_reach_over_the_cache():
    model = random_model(1, num_tokens=11)
    cache = KVCache(model.config, batch=len(model.tokens), capacity=20, dtype=np.float64)
    run(model, numerics=FLOAT64, cache=cache)
    tokens, positions = model.tokens[:, :2], model.positions.max(axis=1, keepdims=True) + np.arange(1, 3)
    seen = dict(record(model, numerics=FLOAT64, tokens=tokens, positions=positions, cache=cache))
    for name in ("attn.scores", "attn.probs"):  # filled slots, not the capacity
        assert seen[f"layers.0.{name}"].shape == (len(tokens), model.config.layers[0].num_heads, 2, 13)
    np.testing.assert_allclose(seen["layers.0.attn.probs"].sum(axis=-1), 1, rtol=1e-14)  # 13 addends, 1e-16 each


@pytest.mark.parametrize("seed", range(3))
def test_what_a_tap_returns_is_used(seed):
    """A change of any tensor reaches the logits, and arrives as if it had been made one step later."""
    model = random_model(seed, num_tokens=11, num_layers=2)
    plain = run(model, numerics=FLOAT64)
    for changed in axes_of(model.config):
        # Not a factor: the last norm would take it out again.
        other = run(model, numerics=FLOAT64, tap=lambda name, x, at=changed: x[..., ::-1] if name == at else x)
        assert error(other, plain) > 1e-6, changed

    def patched(at, change):
        return run(model, numerics=FLOAT64, tap=lambda name, x: change(x) if name == at else x)

    rng = np.random.default_rng(seed)
    step = rng.normal(size=(*model.tokens.shape, model.config.hidden_size))
    wide = rng.normal(size=(*model.tokens.shape, model.config.layers[0].intermediate_size))
    for one, other, change in [  # the same change, made on either side of an addition or a product
        ("layers.0.attn.out", "layers.0.attn.residual", lambda x: x + step),
        ("layers.1.mlp.down", "layers.1.out", lambda x: x + step),
        ("layers.0.mlp.act", "layers.0.mlp.gated", lambda x: x * wide),
        ("layers.0.mlp.up", "layers.0.mlp.gated", lambda x: x * wide),
        ("layers.1.attn.q_rope", "layers.1.attn.scores", lambda x: x * 1.5),
        ("layers.1.attn.k_rope", "layers.1.attn.scores", lambda x: x * 1.5),
        ("layers.1.attn.v", "layers.1.attn.mix", lambda x: x * 1.5),
        ("layers.1.attn.probs", "layers.1.attn.mix", lambda x: x * 1.5),
        ("final_norm", "logits", lambda x: x * 1.5),
    ]:
        assert error(patched(one, change), patched(other, change)) <= FLOAT64_BOUND, (one, other)
        assert error(patched(one, change), plain) > 1e-6
    forced = rng.normal(size=plain.shape)
    assert np.array_equal(patched("logits", lambda x: forced)[model.real], forced[model.real])
