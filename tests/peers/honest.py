"""Traces of transformers' own Gemma, nothing replaced: any dtype, eager or sdpa, in one call or through its cache.

A cached run's trace is put together from its steps. Modules are watched by hooks, rotary embedding and softmax by
wrappers that call the originals; sdpa shows neither scores nor probabilities.
"""

import contextlib
import inspect
import itertools
from unittest import mock

import numpy as np
import torch
from transformers.cache_utils import DynamicCache
from transformers.models.gemma import modeling_gemma

from refgemma.oracle.traces.trace import Trace
from tests.peers.planted import peer_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cache_argument(model):
    """What `forward` calls its cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def honest_trace(model, dtype="float32", attention="eager", steps=1, threads=1, peer=None):
    """Trace of a `tests.models.Model`, fed in so many steps."""
    peer = peer or peer_of(model, DTYPES[dtype], attention)
    B, T = model.tokens.shape
    ends = np.unique(np.linspace(0, T, steps + 1).astype(int))
    cache = DynamicCache(config=peer.config) if len(ends) > 2 else None
    tensors = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for start, stop in itertools.pairwise(ends):
            part = slice(start, stop)
            seen = watched(peer, model.tokens[:, part], model.positions[:, part], model.real[:, :stop], cache)
            for name, value in seen.items():
                if name.endswith(("scores", "probs")):
                    whole = tensors.setdefault(name, np.zeros((B, value.shape[1], T, T), np.float32))
                    whole[:, :, part, :stop] = value
                else:
                    whole = tensors.setdefault(name, np.zeros((B, T, *value.shape[2:]), np.float32))
                    whole[:, part] = value
    finally:
        torch.set_num_threads(before)
    return Trace(tensors, dict.fromkeys(tensors, dtype), model.tokens, model.positions, model.config)


def watched(peer, tokens, positions, real, cache):
    """Named tensors of one call, float32 arrays."""
    seen = {}
    B, T = tokens.shape
    H = peer.config.head_dim
    layer = -1

    def keep(name, value, heads=False):
        value = value.detach().float().numpy().copy()
        seen[name] = value.reshape(B, T, -1, H) if heads else value

    turn, softmax = modeling_gemma.apply_rotary_pos_emb, torch.nn.functional.softmax

    def watched_turn(q, k, cos, sin, **kwargs):
        nonlocal layer
        layer += 1
        turned = turn(q, k, cos, sin, **kwargs)
        for name, value in zip(("q_rope", "k_rope"), turned, strict=True):
            keep(f"layers.{layer}.attn.{name}", value.transpose(1, 2))
        return turned

    def watched_softmax(scores, **kwargs):
        keep(f"layers.{layer}.attn.scores", scores)
        return softmax(scores, **kwargs)

    with contextlib.ExitStack() as stack:

        def output(module, name, heads=False):
            hook = module.register_forward_hook(lambda _, args, out: keep(name, out, heads))
            stack.callback(hook.remove)

        def given(module, name, heads=False):
            hook = module.register_forward_pre_hook(lambda _, args: keep(name, args[0], heads))
            stack.callback(hook.remove)

        body = peer.model
        output(body.embed_tokens, "embed")
        for i, block in enumerate(body.layers):
            attn, mlp, at = block.self_attn, block.mlp, f"layers.{i}."
            output(block.input_layernorm, at + "attn.norm")
            for name, module in (("q", attn.q_proj), ("k", attn.k_proj), ("v", attn.v_proj)):
                output(module, at + "attn." + name, heads=True)

            def probs(_, args, out, at=at):
                if out[1] is not None:
                    keep(at + "attn.probs", out[1])

            stack.callback(attn.register_forward_hook(probs).remove)
            given(attn.o_proj, at + "attn.mix", heads=True)
            output(attn.o_proj, at + "attn.out")
            given(block.post_attention_layernorm, at + "attn.residual")
            output(block.post_attention_layernorm, at + "mlp.norm")
            output(mlp.gate_proj, at + "mlp.gate")
            output(mlp.up_proj, at + "mlp.up")
            output(mlp.act_fn, at + "mlp.act")
            given(mlp.down_proj, at + "mlp.gated")
            output(mlp.down_proj, at + "mlp.down")
            output(block, at + "out")
        output(body.norm, "final_norm")
        output(peer.lm_head, "logits")
        stack.enter_context(mock.patch.object(modeling_gemma, "apply_rotary_pos_emb", watched_turn))
        stack.enter_context(mock.patch.object(torch.nn.functional, "softmax", watched_softmax))
        with torch.no_grad():
            peer(
                input_ids=torch.from_numpy(np.ascontiguousarray(tokens)),
                attention_mask=torch.from_numpy(real.astype(np.int64)),
                position_ids=torch.from_numpy(np.maximum(positions, 0)),
                use_cache=cache is not None,
                **{cache_argument(peer): cache},
            )
    return seen
