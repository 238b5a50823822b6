"""Dumps as users make them, read by name and shape: forward hooks on transformers, `capture_intermediates` in Flax.

Each is compared with `tests.peers.recorded`, or with a second run of the engine, bit for bit.
"""

import numpy as np
import pytest

import refgemma
from refgemma.checkpoint.folder import find_model
from refgemma.oracle import compare, read_foreign, trace
from refgemma.oracle.foreign.names import match
from refgemma.oracle.operations import names_of
from tests.models import random_model
from tests.oracle.gemmas import gemma_of

pytestmark = pytest.mark.peers

NOT_HOOKED = ("attn.q_rope", "attn.k_rope", "attn.scores")  # what no module gives out


def hooked(peer, inputs):
    """Everything that modules are given and give out, by name, and what the model returns; as people dump it."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install refgemma[peers]")
    seen = {}

    def keep(name):
        def hook(_, args, out):
            outs = out if isinstance(out, tuple) else (out,)
            for i, value in enumerate(outs):
                if isinstance(value, torch.Tensor):
                    seen[name if len(outs) == 1 else f"{name}.{i}"] = value.detach().clone()
            if args and isinstance(args[0], torch.Tensor):
                seen[f"{name}.input"] = args[0].detach().clone()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in peer.named_modules() if name]
    with torch.no_grad():
        out = peer(**inputs, use_cache=False, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    seen |= {f"hidden_states.{i}": value for i, value in enumerate(out.hidden_states)}
    seen |= {f"attentions.{i}": value for i, value in enumerate(out.attentions) if value is not None}
    return {name: value.contiguous() for name, value in seen.items()} | inputs


def inputs_of(tokens, positions):
    torch = pytest.importorskip("torch", reason="needs torch: pip install refgemma[peers]")
    real = positions >= 0
    return {
        "input_ids": torch.from_numpy(tokens),
        "attention_mask": torch.from_numpy(real.astype(np.int64)),
        "position_ids": torch.from_numpy(np.where(real, positions, 0)),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(9))
def test_hooks_on_a_random_model(seed, dtype, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install refgemma[peers]")
    pytest.importorskip("transformers", reason="needs transformers: pip install refgemma[peers]")
    from safetensors.torch import save_file

    from tests.peers.eager import eager_model
    from tests.peers.recorded import narrow_model, record

    torch.set_num_threads(1)
    # T = N, B = 1 and K = 1 come in turn, where sizes say less; one model is so small that T = B = 1.
    model = random_model(seed, num_tokens=[8, 3, 6, 4, 11, 2, 5, 1, 9][seed])
    peer = eager_model(model) if dtype == "float32" else narrow_model(model, tmp_path)
    B, T = model.tokens.shape
    padded = bool(seed % 2)
    positions = model.positions if padded else np.tile(np.arange(T), (B, 1))  # `record` masks no padding
    dump = hooked(peer, inputs_of(model.tokens, positions))
    path = tmp_path / "theirs.safetensors"
    save_file(dump, path)
    want = None if padded else record(peer, model.tokens, positions)
    got = read_foreign(path, model.config)
    assert np.array_equal(got.tokens, model.tokens)
    assert np.array_equal(got.positions, positions)
    assert [name for name in names_of(model.config) if not name.endswith(NOT_HOOKED)] == list(got.tensors)
    assert set(got.dtypes.values()) == {dtype}
    for name, value in got.tensors.items():
        # Whatever else in the dump is known as this tensor holds the same numbers.
        for theirs, array in dump.items():
            found = match(theirs, model.config)
            if found and found.tensors == (name,) and array.dtype.is_floating_point:
                assert np.array_equal(array.float().numpy().reshape(value.shape), value), (name, theirs)
        if want is not None:
            assert np.array_equal(value, want[name]), name
    report = compare(None, path, model=gemma_of(model, "float64"))
    assert report.arithmetic.startswith(dtype)
    assert report.ok, report.text()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hooks_on_tiny_it(dtype, attention, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install refgemma[peers]")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install refgemma[peers]")
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        find_model("tiny-it"), dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()
    gemma = refgemma.load("tiny-it")
    tokens = np.array([gemma.encode_prompt("What is 17 + 25?")])
    save_file(hooked(peer, inputs_of(tokens, np.arange(tokens.shape[1])[None])), tmp_path / "theirs.safetensors")
    ours = tmp_path / "ours.safetensors"
    trace(gemma, tokens, to=ours, model="tiny-it", names="logits")
    report = compare(ours, tmp_path / "theirs.safetensors")
    print(f"\n{report.text()}")
    assert report.ok
    missing = 3 * 6 if attention == "eager" else 4 * 6  # sdpa gives no probabilities
    assert sum(one.grade == "not given" for one in report.findings) == missing
    assert report.arithmetic.startswith(dtype)
    # It can fail: eps and the activation are the same everywhere, so one weight is changed in their engine.
    with torch.no_grad():
        peer.model.layers[3].self_attn.v_proj.weight[5] *= 1.02
    save_file(hooked(peer, inputs_of(tokens, np.arange(tokens.shape[1])[None])), tmp_path / "theirs.safetensors")
    assert compare(ours, tmp_path / "theirs.safetensors").first_divergence.name == "layers.3.attn.v"


def test_intermediates_that_flax_captures(tmp_path):
    for module in ("jax", "flax", "gemma"):
        pytest.importorskip(module, reason="needs google-deepmind/gemma 2.0.2 and what it runs on")
    import jax
    import jax.numpy as jnp

    from tests.peers.recorded_deepmind import flax_model, flax_params, record

    for seed in range(6):
        model = random_model(seed, num_tokens=7)
        B = len(model.tokens)
        positions = np.tile(np.arange(7), (B, 1))  # `record` masks no padding
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((7, 7), bool)), (B, 7, 7))
        _, state = flax_model(model.config).apply(
            flax_params(model.params, model.config),
            jnp.asarray(model.tokens),
            jnp.asarray(positions),
            None,
            mask,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        leaves, _ = jax.tree_util.tree_flatten_with_path(state["intermediates"])
        dump = {"/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in at): np.asarray(v) for at, v in leaves}
        np.savez(tmp_path / "theirs.npz", **dump, tokens=model.tokens)
        got = read_foreign(tmp_path / "theirs.npz", model.config)
        want = record(model.params, model.config, model.tokens, positions)
        kinds = ("attn.norm", "attn.q", "attn.k", "attn.v", "attn.out", "mlp.norm", "mlp.down", "out")
        assert {f"layers.{i}.{kind}" for i in range(model.config.num_layers) for kind in kinds} < set(got.tensors)
        for name, value in got.tensors.items():
            assert np.array_equal(value, want[name]), name
