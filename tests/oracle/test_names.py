"""Names of other engines: recognised where they are known, and nothing else taken for one."""

import pytest

from refgemma.config import SIZES
from refgemma.oracle.foreign.names import mapped, match
from refgemma.oracle.operations import axes_of, names_of, split_name

CONFIG = SIZES["gemma-2b"]

KNOWN = {
    # transformers: forward hooks, as people name what they keep
    "model.embed_tokens": "embed",
    "model.layers.0.input": "embed",
    "model.layers.4.input.0": "layers.3.out",
    "model.layers.4": "layers.4.out",
    "model.layers.4.output.0": "layers.4.out",
    "model.layers[4].output[0]": "layers.4.out",
    "model.layers.4.input_layernorm": "layers.4.attn.norm",
    "model.layers.4.input_layernorm.output": "layers.4.attn.norm",
    "model.layers.17.self_attn.q_proj": "layers.17.attn.q",
    "model.layers.4.self_attn.k_proj.out": "layers.4.attn.k",
    "_orig_mod.model.model.layers.4.self_attn.v_proj.output": "layers.4.attn.v",
    "model.layers.4.self_attn.o_proj.inputs.0": "layers.4.attn.mix",
    "base_model.model.model.layers.4.self_attn.o_proj": "layers.4.attn.out",
    "model.layers.4.post_attention_layernorm.input": "layers.4.attn.residual",
    "model.layers.4.post_attention_layernorm": "layers.4.mlp.norm",
    "model.layers.4.mlp.gate_proj": "layers.4.mlp.gate",
    "model.layers.4.mlp.up_proj": "layers.4.mlp.up",
    "model.layers.4.mlp.act_fn": "layers.4.mlp.act",
    "model.layers.4.mlp.down_proj.input": "layers.4.mlp.gated",
    "model.layers.4.mlp.down_proj": "layers.4.mlp.down",
    "model.layers.4.mlp": "layers.4.mlp.down",
    "model.norm": "final_norm",
    "model.norm.input": "layers.17.out",
    "lm_head": "logits",
    "lm_head.input": "final_norm",
    "outputs.logits": "logits",
    "hidden_states.0": "embed",
    "hidden_states[5]": "layers.4.out",
    "outputs/hidden_states_17": "layers.16.out",
    "hidden_states.18": "final_norm",  # transformers puts the stream after the last norm at the end
    "attentions.4": "layers.4.attn.probs",
    # Flax: capture_intermediates
    "embedder/encode/0": "embed",
    "layer_4/__call__/0/1": "layers.4.out",
    "intermediates/layer_4/attn/q_einsum/__call__/0": "layers.4.attn.q",
    "layer_4/attn/attn_vec_einsum/__call__/0": "layers.4.attn.out",
    "layer_4/attn/__call__/0/1": "layers.4.attn.out",
    "layer_4/pre_attention_norm/__call__/0": "layers.4.attn.norm",
    "layer_4/pre_ffw_norm/__call__/0": "layers.4.mlp.norm",
    "layer_4/mlp/__call__/0": "layers.4.mlp.down",
    "final_norm/__call__/0": "final_norm",
    "embedder/decode/0": "logits",
    "gemma1_mqa/hidden/layer_4": "layers.4.out",
}
UNKNOWN = [
    "model.rotary_emb",
    "model.layers.18.mlp",  # the model has 18 layers
    "hidden_states.19",
    "attentions.18",
    "model.layers.4.mlp.something",
    "model.layers.4.self_attn.q_proj.weight",
    "weights/layer_0/mlp/linear",
    "params/layer_0/mlp/gating_einsum",
    "grads.model.layers.4.mlp",
    "past_key_values.0.key",
    "layers.4.norm",
    "tokens",
    "input",
    "0",
    "",
]


@pytest.mark.parametrize(("theirs", "ours"), KNOWN.items())
def test_known_names(theirs, ours):
    assert match(theirs, CONFIG).tensors == (ours,)


@pytest.mark.parametrize("name", names_of(CONFIG))
def test_our_own_names(name):
    assert match(name, CONFIG).tensors == (name,)
    assert match(name.replace(".", "/"), CONFIG).tensors == (name,)
    assert match(f"trace.{name}.out", CONFIG).tensors == (name,)


def test_names_of_several_tensors():
    assert match("layer_4/attn/kv_einsum", CONFIG).tensors == ("layers.4.attn.k", "layers.4.attn.v")
    assert match("model.layers.4.self_attn.qkv_proj", CONFIG).tensors == tuple(f"layers.4.attn.{x}" for x in "qkv")
    assert match("model.layers.4.mlp.gate_up_proj", CONFIG).tensors == ("layers.4.mlp.gate", "layers.4.mlp.up")
    assert match("model.layers.4.self_attn", CONFIG).tensors == ("layers.4.attn.out", "layers.4.attn.probs")


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_names_are_not_guessed(name):
    assert match(name, CONFIG) is None


def test_what_is_surest_comes_first():
    ranks = [match(name, CONFIG).rank for name in ("embed", "model.layers.0.input", "hidden_states.0", "embed_tokens")]
    assert ranks == sorted(set(ranks))


def test_a_mapping():
    names = ["blk.0.q", "blk.17.q", "other", "out"]
    found = mapped({"blk.{i}.q": "layers.{i}.attn.q", "out": "logits"}, names, CONFIG)
    assert {name: one.tensors for name, one in found.items()} == {
        "blk.0.q": ("layers.0.attn.q",),
        "blk.17.q": ("layers.17.attn.q",),
        "out": ("logits",),
    }
    with pytest.raises(ValueError, match=r"names 'blk\.3\.q', which is not in the file: the nearest is 'blk\.\d+\.q'"):
        mapped({"blk.3.q": "logits"}, names, CONFIG)
    with pytest.raises(ValueError, match=r"names 'blk\.{i}\.k', which is not in the file"):
        mapped({"blk.{i}.k": "layers.{i}.attn.k"}, names, CONFIG)
    with pytest.raises(
        ValueError, match="'out' for 'logit', which is not the name of a tensor: the nearest is 'logits'"
    ):
        mapped({"out": "logit"}, names, CONFIG)


def test_names_and_axes():
    names = names_of(CONFIG)
    assert len(names) == 3 + 18 * 18
    assert (names[0], names[1], names[-1]) == ("embed", "layers.0.attn.norm", "logits")
    assert split_name("layers.12.attn.q_rope") == (12, "attn.q_rope")
    assert split_name("logits") == (None, "logits")
    assert axes_of("layers.0.attn.scores") == "BNTS"
    for name in ("layers.0", "layers.01.out", "layers.0.embed", "attn.q", ""):
        with pytest.raises(ValueError, match=r"unknown tensor '.*': expected one of embed, "):
            axes_of(name)
