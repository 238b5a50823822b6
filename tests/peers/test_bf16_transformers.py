"""Profile bf16-transformers against transformers in bfloat16 on the CPU (eager), live; and torch's complex rotation.

`pytest -m peers tests/peers/test_bf16_transformers.py -s` prints the shares of bit-equal numbers.
"""

import math
from collections import defaultdict

import numpy as np
import pytest

from refgemma.model import forward
from refgemma.numerics import FLOAT32, PROFILES
from refgemma.ops.embedding import embed
from refgemma.ops.linear import linear
from refgemma.ops.mlp import gelu
from refgemma.ops.norm import rms_norm
from refgemma.ops.rope import rope, rope_table
from tests.bfloat16 import allowed, causal, dot, frequency_angle, narrow_example, nearest

pytestmark = pytest.mark.peers

PROFILE = PROFILES["bf16-transformers"]
OTHERS = [PROFILES["bf16-deepmind"], PROFILES["bf16-gemma-pytorch"], FLOAT32]
BAR = 0.999  # of an operation alone: the rest sits on midpoints


@pytest.fixture(scope="module")
def torch():
    """The library, on one thread."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install refgemma[peers]")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def gemma(torch):
    """Module of transformers with Gemma's operations."""
    pytest.importorskip("transformers", reason="needs transformers: pip install refgemma[peers]")
    from transformers.models.gemma import modeling_gemma

    return modeling_gemma


@pytest.fixture(scope="module")
def recorded(gemma):
    """Our recorder of whole models."""
    from tests.peers import recorded

    return recorded


@pytest.fixture(scope="module")
def narrow(torch):
    """Function from an array to the tensor of the nearest bfloat16 numbers, and the same numbers in float32."""

    def to_both(array):
        tensor = torch.from_numpy(np.asarray(array, np.float32)).to(torch.bfloat16)
        return tensor, tensor.float().numpy()

    return to_both


def from_midpoint(exact):
    """Distance of each number to the nearest one halfway between two bfloat16 numbers, relatively."""
    scaled = np.frexp(np.abs(exact))[0] * 256
    return np.abs(scaled - np.floor(scaled) - 0.5) / scaled


def report(name, equal, exact):
    """Print, and return, the share of equal numbers and the largest distance of a miss from a midpoint."""
    worst = from_midpoint(exact[~equal]).max(initial=0)
    print(
        f"\n{name}: {equal.mean():.4%} of {equal.size:,} bit-equal, {np.sum(~equal)} off, {worst:.1e} from a midpoint"
    )
    return equal.mean(), worst


# ---- operations alone


@pytest.mark.parametrize("D", [40, 184, 2048])
def test_norm_alone(torch, gemma, narrow, D):
    rng = np.random.default_rng(D)
    x, x_here = narrow(rng.normal(size=(400_000 // D, D)) * np.exp(rng.normal(size=(400_000 // D, 1)) * 3))
    weight, weight_here = narrow(rng.normal(size=D) * 0.4)
    module = gemma.GemmaRMSNorm(D).to(torch.bfloat16)
    module.weight.data = weight
    with torch.no_grad():
        theirs = module(x).float().numpy()
    wide = x_here.astype(np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-6) * (1 + weight_here.astype(np.float64))
    share, worst = report(f"norm, D = {D}", rms_norm(x_here, weight_here, eps=1e-6, numerics=PROFILE) == theirs, exact)
    assert share >= BAR
    assert worst <= 1e-5
    for points in ("norm.normed", "norm.gain", "norm.mean"):  # B4, B5, B6
        wrong = rms_norm(x_here, weight_here, eps=1e-6, numerics=PROFILE.with_(points, "bfloat16"))
        assert np.mean(wrong == theirs) < BAR


@pytest.mark.parametrize("D", [40, 184, 2048, 3072])
def test_embedding_alone(torch, gemma, narrow, D):
    table, table_here = narrow(np.random.default_rng(D).normal(size=(200, D)))
    module = gemma.GemmaTextScaledWordEmbedding(200, D, 0, embed_scale=D**0.5).to(torch.bfloat16)
    module.weight.data = table
    tokens = np.arange(200)[None]
    with torch.no_grad():
        theirs = module(torch.from_numpy(tokens)).float().numpy()
    assert np.array_equal(embed(tokens, table_here, numerics=PROFILE), theirs)
    assert np.mean(embed(tokens, table_here, numerics=PROFILE.without("embed.scale")) == theirs) < BAR  # A2


def test_gelu_alone_on_every_bfloat16_number(torch):
    """All of them, up to 2**40, where the cube leaves float32."""
    bits = np.arange(2**16, dtype=np.uint32)
    x = (bits << 16).view(np.float32)
    x = x[np.abs(x) < 2.0**40]
    theirs = torch.nn.functional.gelu(torch.from_numpy(x).to(torch.bfloat16), approximate="tanh").float().numpy()
    ours = gelu(x, numerics=PROFILE)
    wide = x.astype(np.float64)
    tanh = np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    exact = 0.5 * wide * (1 + tanh)
    # Below -5 one plus the tangent is a few units of 2**-24 or nothing, so one unit of the tangent decides, and torch
    # itself gives now this and now that, by its vector length. Those get one unit; all else the bar.
    bare = 1 + tanh < 2.0**-22
    assert np.all(np.abs(ours - theirs)[bare] <= np.abs(wide[bare]) / 2 * 2**-24 * (1 + 2**-8))
    print(
        f"\ngelu where the tangent is bare: {np.sum((ours != theirs) & bare)} of {np.sum(bare & (wide > -40))} differ"
    )
    share, worst = report("gelu", (ours == theirs) | bare, exact)
    assert np.mean(ours == theirs) >= BAR
    assert share >= BAR
    assert worst <= 1e-5
    for wrong in (PROFILE.without("gelu.*"), PROFILE.with_("gelu.constant", "bfloat16")):
        mistaken = gelu(x, numerics=wrong) != theirs
        assert from_midpoint(exact[mistaken & ~bare]).max() > 1e-5, wrong.name


@pytest.mark.parametrize("H", [8, 24, 40, 64, 256])
def test_rope_alone(torch, gemma, narrow, H):
    rng = np.random.default_rng(H)
    positions = np.concatenate([np.arange(64), rng.integers(64, 8192, size=200)])[None]
    config = gemma.GemmaConfig(head_dim=H, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    x, x_here = narrow(rng.normal(size=(1, len(positions[0]), 3, H)))
    module = gemma.GemmaRotaryEmbedding(config)
    tables = module(x, torch.from_numpy(positions))
    angle = frequency_angle(H, positions, 10_000.0)
    ours = rope_table(positions, H, 10_000.0, numerics=PROFILE)
    for theirs, our, exact in zip(tables, ours, (np.cos(angle), np.sin(angle)), strict=True):
        share, worst = report(f"rope table, H = {H}", our == theirs.float().numpy()[..., : H // 2], exact)
        assert share >= BAR
        assert worst <= 1e-5
    # Given the table, all that is left are single operations in float32: no choice, so every bit.
    turned, _ = gemma.apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), *tables)
    theirs = turned.transpose(1, 2).float().numpy()
    here = [table.float().numpy()[..., : H // 2] for table in tables]
    assert np.array_equal(rope(x_here, *here, numerics=PROFILE), theirs)
    assert np.mean(rope(x_here, *here, numerics=PROFILE.without("rope.product")) == theirs) < BAR
    exact_angles = rope_table(positions, H, 10_000.0, numerics=PROFILE.without("rope.angle", "rope.frequency"))
    assert H == 8 or np.mean(exact_angles[0] == here[0]) < 1  # frequencies in float32 count, where they are inexact


def test_a_matrix_product_sums_in_float32_and_rounds_once(torch, narrow):
    rng = np.random.default_rng(3)
    for rows, inputs, outputs in ((1, 40, 64), (7, 300, 64), (64, 200, 128), (33, 2048, 512)):
        x, x_here = narrow(rng.normal(size=(1, rows, inputs)))
        w, w_here = narrow(rng.normal(size=(outputs, inputs)) / math.sqrt(inputs))
        theirs = torch.nn.functional.linear(x, w).float().numpy()
        low, high = dot(x_here.astype(np.float64), w_here.astype(np.float64))
        assert np.all((low <= theirs) & (theirs <= high))
        assert np.mean(linear(x_here, w_here, numerics=PROFILE) == theirs) >= BAR
        halves = [x[..., part] @ w[:, part].T for part in (slice(inputs // 2), slice(inputs // 2, inputs))]
        assert np.mean((halves[0] + halves[1]).float().numpy() == theirs) < 0.9  # a sum that is rounded on the way


# ---- models


def run(model, profile, **arguments):
    return forward(model.params, model.config, model.tokens, positions=model.positions, numerics=profile, **arguments)


def test_one_layer_models(recorded, tmp_path):
    shares = defaultdict(list)
    weights = []
    for seed in range(40):
        model = narrow_example(seed, rows=4, num_layers=1)
        theirs = recorded.record(recorded.narrow_model(model, tmp_path), model.tokens, model.positions)["logits"]
        weights.append(theirs.size)
        for profile in (PROFILE, *OTHERS):
            shares[profile.name].append(np.mean(nearest(run(model, profile)) == theirs))
    for name, share in shares.items():
        whole, median = np.average(share, weights=weights), np.median(share)
        print(f"\n{name}: {whole:.2%} of logits bit-equal; a model {min(share):.2%} at least, {median:.2%} median")
        # A flip anywhere reaches a whole row, 1 of 96 here, and those after it: single models may lose some.
        assert (whole >= 0.99 and min(share) >= 0.95) if name == PROFILE.name else max(share) < 0.5


def test_deep_models_forced_operation_by_operation(recorded, tmp_path):
    equal, total = defaultdict(int), defaultdict(int)
    for seed in range(30):
        model = narrow_example(seed)
        seen = recorded.record(recorded.narrow_model(model, tmp_path), model.tokens, model.positions)

        def tap(name, value, seen=seen, model=model):
            theirs, place = seen[name], ...
            kind = name.split(".", 2)[-1]
            if kind == "attn.scores":
                place = (..., causal(value.shape[-1]))
            same = (value == theirs)[place]
            equal[kind] += np.count_nonzero(same)
            total[kind] += same.size
            if not same.all():
                arguments = (seen, model.params, model.config, model.tokens, model.positions)
                for got in (theirs, value):
                    low, high = allowed("bf16-transformers", name, *arguments)
                    assert np.all(((low <= got) & (got <= high))[place]), (model.seed, name)
            return theirs

        run(model, PROFILE, tap=tap)
    print()
    for kind in total:
        print(f"{kind:14} {equal[kind] / total[kind]:.4%} of {total[kind]:,}")
    assert len(total) == 21
    assert all(equal[kind] >= 0.99 * total[kind] for kind in total)


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_was_cast_has_its_frequencies_in_bfloat16(torch, recorded, seed, tmp_path):
    """``.to(bfloat16)`` narrows the buffers, too; ``from_pretrained(dtype=...)``, which the profile is, does not."""
    model = narrow_example(seed)
    loaded = recorded.narrow_model(model, tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    cast = recorded.narrow_model(model, tmp_path, dtype=torch.float32).to(torch.bfloat16)
    assert cast.model.rotary_emb.inv_freq.dtype == torch.bfloat16

    def worst(peer, profile):
        seen = recorded.record(peer, model.tokens, model.positions)
        shares = {}

        def tap(name, value):
            shares[name] = np.mean(value == seen[name])
            return seen[name]

        run(model, profile, tap=tap)
        return min(share for name, share in shares.items() if name.endswith("_rope"))

    of_cast = PROFILE.with_("rope.frequency", "bfloat16")
    assert worst(cast, of_cast) >= BAR
    assert worst(loaded, PROFILE) >= BAR
    assert worst(cast, PROFILE) < 0.9
    assert worst(loaded, of_cast) < 0.9


# ---- gemma_pytorch: what it does otherwise, with torch's own operations


def test_a_complex_rotation_in_float32_is_the_rope_of_gemma_pytorch(torch, narrow):
    H, profile = 24, PROFILES["bf16-gemma-pytorch"]
    rng = np.random.default_rng(4)
    positions = np.concatenate([np.arange(64), rng.integers(64, 8192, size=200)])[None]
    x, x_here = narrow(rng.normal(size=(1, len(positions[0]), 3, H)))
    frequency = 1.0 / 10_000.0 ** (torch.arange(0, H, 2).float() / H)
    angle = torch.outer(torch.from_numpy(positions[0]), frequency)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[None, :, None]
    theirs = torch.cat([turned.real, turned.imag], dim=-1).to(torch.bfloat16).float().numpy()

    def share(numerics):
        tables = rope_table(positions, H, 10_000.0, numerics=numerics)
        return np.mean(rope(x_here, *tables, numerics=numerics) == theirs)

    print(f"\ncomplex rotation: {share(profile):.4%} bit-equal")
    assert share(profile) >= BAR
    assert share(PROFILE) < 0.9


def test_a_query_scaled_in_bfloat16_is_the_query_of_gemma_pytorch(narrow):
    """The factor stays as it is, the product is rounded; JAX rounds the factor, too."""
    q, q_here = narrow(np.random.default_rng(5).normal(size=(50, 24)))
    theirs = (q * 24**-0.5).float().numpy()
    assert np.array_equal(nearest(q_here * np.float32(24**-0.5)), theirs)
    assert np.mean(nearest(q_here * nearest(24**-0.5)) == theirs) < BAR
