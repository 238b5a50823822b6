"""Single operations and a tiny whole model against values that public code gives; no checkpoint is needed.

`refgemma/oracle/published/data/operations.json` holds constants from the tests of other repositories,
`goldens/deepmind_gemma1_mqa.npz` a run of Google's own Flax code. Each check also sees the usual mistake.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from refgemma.cache import KVCache
from refgemma.config import Config
from refgemma.model import forward
from refgemma.numerics import FLOAT32, FLOAT64
from refgemma.ops.attention import allowed_keys, attention_mix, attention_probs, attention_scores
from refgemma.ops.embedding import embed
from refgemma.ops.linear import linear
from refgemma.ops.mlp import gelu
from refgemma.ops.norm import rms_norm
from refgemma.ops.rope import rope, rope_table
from refgemma.oracle.published.figures import read_json
from tests import truth
from tests.models import widened

OPERATIONS = read_json("operations.json")
GOLDEN = Path(__file__).parent / "goldens" / "deepmind_gemma1_mqa.json"


def vectors(op):
    """Published cases of one operation, as a parametrisation."""
    return pytest.mark.parametrize(
        "case", [pytest.param(c, id=c["id"]) for c in OPERATIONS["vectors"] if c["op"] == op]
    )


def array(value):
    """Float32 array of a list, or of {"fill", "shape"}."""
    if isinstance(value, dict):
        return np.full(value["shape"], value["fill"], dtype=np.float32)
    return np.array(value, dtype=np.float32)


def in_out(value):
    """A matrix published as (in, out), turned to our (out, in)."""
    return np.ascontiguousarray(array(value).T)


@vectors("rms_norm")
def test_rms_norm(case):
    x, weight, want = array(case["x"]), array(case["weight"]), array(case["expected"])
    # Upstream asks for equality in float32; another order of the same four roundings may differ in the last place.
    assert np.all(np.abs(rms_norm(x, weight, eps=case["eps"]) - want) <= np.spacing(want))
    for bug in ("B1", "B2", "B9", "B9 1e-5"):
        assert np.any(np.abs(truth.norm(x, weight, case["eps"], {bug}) - want) > np.spacing(want)), bug


@vectors("embed")
def test_embed(case):
    got = embed(np.array([case["tokens"]]), array(case["table"]))[0]
    assert np.array_equal(got, array(case["expected"]))  # sqrt(4) is exact
    assert not np.array_equal(got, array(case["table"])[case["tokens"]])  # A1: a row without its factor


@vectors("unembed")
def test_unembed(case):
    got = linear(array(case["x"]), array(case["table"]))
    assert np.array_equal(got, array(case["expected"]))  # small whole numbers
    assert not np.array_equal(got * 2**0.5, array(case["expected"]))  # A3: the factor of the embedding, sqrt(2)


@vectors("mlp")
def test_mlp(case):
    x, gate, up, down = array(case["x"]), in_out(case["gate"]), in_out(case["up"]), in_out(case["down"])
    want = np.array(case["expected_component_0_per_row"])

    def mlp(activation):
        return linear(activation(linear(x, gate)) * linear(x, up), down)[:, 0, 0]

    assert np.all(np.abs(mlp(gelu) - want) <= case["tolerance"])
    for bug in ("C1", "C2"):
        wrong = mlp(lambda z, bug=bug: truth.activation(z, {bug}).astype(np.float32))
        assert np.all(np.abs(wrong - want) > case["tolerance"]), bug


@vectors("gated_sum")
def test_gate_and_up(case):
    x, gating = array(case["x"]), array(case["gating"])
    if case["gating_axes"] == "[gate, up][in][F]":
        gating = np.ascontiguousarray(gating.swapaxes(-1, -2))
    gate, up = gating
    want = array(case["expected"])

    def gated_sum(gate, up):
        return -0.5 * np.sum(gelu(linear(x, gate)) * linear(x, up), axis=(0, 1))

    assert np.all(np.abs(gated_sum(gate, up) - want) <= case["tolerance"])
    assert np.any(np.abs(gated_sum(up, gate) - want) > case["tolerance"])  # C3
    other_order = [w.T.reshape(w.shape) for w in (gate, up)]
    assert np.any(np.abs(gated_sum(*other_order) - want) > case["tolerance"])  # C3 reshaped


@vectors("rope")
def test_rope(case):
    x = array(case["x"])
    if case["x_axes"] == "BTH":
        x = x[:, :, None]
    H = x.shape[-1]
    positions = np.broadcast_to(np.array(case["positions"]), x.shape[:2])
    cos, sin = rope_table(positions, H, case["theta"], numerics=FLOAT32)
    got = rope(x, cos, sin, numerics=FLOAT32)
    wrong = np.array(
        [[truth.turn(x[b, t], p, case["theta"], {"D7"}) for t, p in enumerate(row)] for b, row in enumerate(positions)]
    )
    if "expected" in case:
        want = array(case["expected"])
    else:  # two of the positions are printed
        want = np.array([case["expected_at_position_0"], case["expected_at_position_3"]])
        got, wrong = got[0, [0, 3], 0], wrong[0, [0, 3], 0]
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= case["tolerance"]
    assert np.abs(wrong - want).max() > 1000 * case["tolerance"]  # D7: other lanes


@vectors("attention_with_cache")
def test_attention_with_cache(case):
    """A first token with two empty slots that are visible, too: zero keys and values that share the softmax."""
    x = array(case["x"])  # BTD
    w_q, w_k, w_v = array(OPERATIONS["attention_weights"]["qkv"]).swapaxes(-1, -2)  # each N, H, D
    w_out = array(OPERATIONS["attention_weights"]["out"])  # N, H, D
    (N, H, D), (B, T, _), S = w_q.shape, x.shape, case["slots"]
    want = array(case["expected"])

    def attend(scale, slots):
        q, k, v = (linear(x, w.reshape(N * H, D)).reshape(B, T, N, H) for w in (w_q, w_k, w_v))
        table = rope_table(np.full((B, T), case["position"]), H, 10_000.0, numerics=FLOAT32)
        keys, values = np.zeros((2, B, N, S, H), dtype=np.float32)
        keys[:, :, case["filled_slot"]] = rope(k, *table, numerics=FLOAT32)[:, 0]
        values[:, :, case["filled_slot"]] = v[:, 0]
        scores = attention_scores(rope(q, *table, numerics=FLOAT32), keys, scale=scale)  # BNTS
        allowed = np.broadcast_to(np.arange(S) < slots, (B, T, S))
        mix = attention_mix(attention_probs(scores, allowed), values)  # BTNH
        return linear(mix.reshape(B, T, N * H), np.ascontiguousarray(w_out.reshape(N * H, D).T))

    assert np.abs(attend(case["query_scale"], S) - want).max() <= case["tolerance"]
    assert np.abs(attend(case["query_scale"] * 2, S) - want).max() > case["tolerance"]  # E1: another query scale
    assert np.abs(attend(case["query_scale"], 1) - want).max() > case["tolerance"]  # one slot is not three


@pytest.mark.parametrize("case", [pytest.param(c, id=c["id"]) for c in OPERATIONS["masks"]])
def test_mask(case):
    query, key = np.array(case["query_positions"]), np.array(case["key_positions"])
    distance = query[:, None] - key  # TS
    near = distance < (case["window"] or np.inf)
    want = np.array(case["expected"], dtype=bool)
    assert np.array_equal(allowed_keys(query[None], key[None])[0] & near, want)
    for wrong in (near & (key >= 0), near & (distance > 0) & (key >= 0)):  # sees what comes later; does not see itself
        assert not np.array_equal(wrong, want)
    if np.any(key < 0):
        assert not np.array_equal(distance >= 0, want)  # sees padding


@pytest.fixture(scope="module")
def golden():
    """Certificate, configuration, params in our layout, and the arrays of the Flax run."""
    certificate = json.loads(GOLDEN.read_text(encoding="utf-8"))
    path = GOLDEN.with_name(certificate["file"])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == certificate["sha256"]
    with np.load(path) as file:
        arrays = dict(file)
    sizes = certificate["config"]
    config = Config.uniform(
        max_positions=8192, query_scale=sizes["head_dim"] ** -0.5, tie_word_embeddings=True, **sizes
    )
    return certificate, config, flax_params(arrays, config), arrays


def flax_params(arrays, config):
    """Weights of the Flax parameter tree in our layout, (out, in)."""
    D, N, K, H = (
        config.hidden_size,
        config.layers[0].num_heads,
        config.layers[0].num_kv_heads,
        config.layers[0].head_dim,
    )

    def layer(i):
        own = {name.removeprefix(f"weights/layer_{i}/"): w for name, w in arrays.items() if f"/layer_{i}/" in name}
        (k, v), (gate, up) = own["attn/kv_einsum/w"], own["mlp/gating_einsum"]  # KDH each, DF each
        attn = {
            "norm": own["pre_attention_norm/scale"],
            "q": own["attn/q_einsum/w"].swapaxes(1, 2).reshape(N * H, D),
            "k": k.swapaxes(1, 2).reshape(K * H, D),
            "v": v.swapaxes(1, 2).reshape(K * H, D),
            "out": own["attn/attn_vec_einsum/w"].reshape(N * H, D).T,
        }
        mlp = {"norm": own["pre_ffw_norm/scale"], "gate": gate.T, "up": up.T, "down": own["mlp/linear"].T}
        return {"attn": contiguous(attn), "mlp": contiguous(mlp)}

    embed = arrays["weights/embedder/input_embedding"]
    layers = [layer(i) for i in range(config.num_layers)]
    return {"embed": embed, "layers": layers, "final_norm": arrays["weights/final_norm/scale"], "head": embed}


def contiguous(weights):
    return {name: np.ascontiguousarray(w) for name, w in weights.items()}


@pytest.mark.parametrize("cached", [False, True], ids=["whole", "token by token"])
@pytest.mark.parametrize("numerics", [FLOAT32, FLOAT64], ids=lambda numerics: numerics.name)
def test_flax_run(golden, numerics, cached):
    """The stream after each block, and the logits."""
    certificate, config, params, arrays = golden
    tokens = arrays["tokens"].astype(np.int64)
    params = widened(params) if numerics is FLOAT64 else params
    seen = {}

    def tap(name, value):
        seen.setdefault(name, []).append(value)
        return value

    cache = KVCache(config, batch=len(tokens), capacity=tokens.shape[1], dtype=numerics.dtype) if cached else None
    for part in np.split(tokens, tokens.shape[1], axis=1) if cached else [tokens]:
        forward(params, config, part, cache=cache, numerics=numerics, tap=tap)
    for i in range(config.num_layers):
        got = np.concatenate(seen[f"layers.{i}.out"], axis=1)
        assert np.abs(got - arrays[f"hidden/layer_{i}"]).max() <= certificate["tolerance"]
    assert np.abs(np.concatenate(seen["logits"], axis=1) - arrays["logits"]).max() <= certificate["tolerance"]


# Not those that this run cannot show: no adapter (A5), no quiet token (B9), no far positions (D2), no padding (D9), one
# key head (E6).
@pytest.mark.parametrize("bug", sorted(set(truth.BUGS) - {"A5", "B9", "B9 1e-5", "D2", "D9", "E6"}))
def test_flax_run_rejects_known_bugs(golden, bug):
    certificate, config, params, arrays = golden
    right = truth.truth_logits(params, config, arrays["tokens"])
    wrong = truth.truth_logits(params, config, arrays["tokens"], bugs={bug})
    assert np.abs(right - arrays["logits"]).max() <= certificate["tolerance"]
    assert np.abs(wrong - arrays["logits"]).max() > certificate["tolerance"]
