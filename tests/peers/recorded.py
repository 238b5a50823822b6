"""transformers' own Gemma in bfloat16 (eager attention), loaded as users load it, with every named tensor recorded.

Nothing of it is replaced: modules are watched through hooks, and the two functions between them, rotary embedding and
softmax, through wrappers that call the originals.
"""

import contextlib
import json
from unittest import mock

import torch
from safetensors.torch import save_file
from transformers.models.gemma import modeling_gemma

from tests.models import hf_config, hf_tensors


def narrow_model(model, folder, dtype=torch.bfloat16):
    """GemmaForCausalLM from a checkpoint that is written to `folder`, as ``from_pretrained(dtype=...)`` makes it."""
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)), encoding="utf-8")
    tensors = {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in hf_tensors(model.params).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return modeling_gemma.GemmaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def record(peer, tokens, positions):
    """Every tensor that `refgemma.model.forward` names, in its axes, as float32 arrays."""
    seen = {}
    B, T = tokens.shape
    H = peer.config.head_dim

    def keep(name, value, heads=False):
        value = value.float().numpy()
        seen[name] = value.reshape(B, T, -1, H) if heads else value

    def output(module, name, heads=False):
        return module.register_forward_hook(lambda _, args, out: keep(name, out, heads))

    def given(module, name, heads=False):
        return module.register_forward_pre_hook(lambda _, args: keep(name, args[0], heads))

    layer = iter(range(len(peer.model.layers)))
    current = 0
    turn, softmax = modeling_gemma.apply_rotary_pos_emb, torch.nn.functional.softmax

    def watched_turn(q, k, cos, sin, **kwargs):
        nonlocal current
        current = next(layer)  # attention is where a layer begins to be watched
        turned = turn(q, k, cos, sin, **kwargs)
        for name, value in zip(("q_rope", "k_rope"), turned, strict=True):
            keep(f"layers.{current}.attn.{name}", value.transpose(1, 2))
        return turned

    def watched_softmax(scores, **kwargs):
        keep(f"layers.{current}.attn.scores", scores)  # the mask is on them: what it hides is of no account
        return softmax(scores, **kwargs)

    with contextlib.ExitStack() as stack:
        hooks = [output(peer.model.embed_tokens, "embed")]
        for i, block in enumerate(peer.model.layers):
            attn, mlp, at = block.self_attn, block.mlp, f"layers.{i}."
            hooks += [
                output(block.input_layernorm, at + "attn.norm"),
                output(attn.q_proj, at + "attn.q", heads=True),
                output(attn.k_proj, at + "attn.k", heads=True),
                output(attn.v_proj, at + "attn.v", heads=True),
                attn.register_forward_hook(lambda _, args, out, at=at: keep(at + "attn.probs", out[1])),
                given(attn.o_proj, at + "attn.mix", heads=True),
                output(attn.o_proj, at + "attn.out"),
                given(block.post_attention_layernorm, at + "attn.residual"),
                output(block.post_attention_layernorm, at + "mlp.norm"),
                output(mlp.gate_proj, at + "mlp.gate"),
                output(mlp.up_proj, at + "mlp.up"),
                output(mlp.act_fn, at + "mlp.act"),
                given(mlp.down_proj, at + "mlp.gated"),
                output(mlp.down_proj, at + "mlp.down"),
                output(block, at + "out"),
            ]
        hooks += [output(peer.model.norm, "final_norm"), output(peer.lm_head, "logits")]
        for hook in hooks:
            stack.callback(hook.remove)
        stack.enter_context(mock.patch.object(modeling_gemma, "apply_rotary_pos_emb", watched_turn))
        stack.enter_context(mock.patch.object(torch.nn.functional, "softmax", watched_softmax))
        with torch.no_grad():
            peer(
                input_ids=torch.from_numpy(tokens),
                attention_mask=torch.ones(tokens.shape, dtype=torch.int64),
                position_ids=torch.from_numpy(positions),
                use_cache=False,
            )
    return seen
