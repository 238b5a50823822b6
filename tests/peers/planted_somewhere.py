"""Known bugs planted in some places of transformers' own Gemma only, such as a wrong kernel in one layer.

As `tests.peers.planted`, whose parts it uses, and like it without `refgemma.oracle`. A place is a layer's number, for a
norm "2 attn" or "2 mlp", or "final".
"""

import contextlib
from types import MethodType
from unittest import mock

import numpy as np
import torch
from transformers.models.gemma import modeling_gemma

from tests.peers import planted

NORMS = {"B1", "B2", "B4", "B5", "B6", "B9", "B9 1e-5"}


def planted_somewhere(model, bugs, *, dtype=torch.float32):
    """Every named tensor of transformers' run with ``{bug: places}`` in it, {name: float32 array}; eager attention."""
    tokens, positions = model.tokens, model.positions
    peer = planted.peer_of(model, dtype, "eager")
    recorder = planted.Recorder(peer, tokens, positions)
    with contextlib.ExitStack() as stack:
        turned, shared = bugs.get("D7", ()), bugs.get("E6", ())
        for bug, places in bugs.items():
            for place in places if bug not in ("D7", "E6") else ():
                plant(peer, bug, place, model.config)
        stack.enter_context(in_calls(modeling_gemma, "apply_rotary_pos_emb", planted.turn_with({"D7"}), turned, 1))
        stack.enter_context(in_calls(modeling_gemma, "repeat_kv", planted.tile_kv, shared, 2))
        recorder.watch(stack)
        with torch.no_grad():
            peer(
                input_ids=torch.from_numpy(np.ascontiguousarray(tokens)),
                attention_mask=torch.from_numpy((positions >= 0).astype(np.int64)),
                position_ids=torch.from_numpy(np.maximum(positions, 0)),
                use_cache=False,
            )
    return recorder.seen


def plant(peer, bug, place, config):
    """One bug in one place."""
    if bug in NORMS:
        norms = dict(zip(("attn", "mlp"), ("input_layernorm", "post_attention_layernorm"), strict=True))
        layer, _, which = str(place).partition(" ")
        modules = [peer.model.norm] if place == "final" else [
            getattr(peer.model.layers[int(layer)], norm) for key, norm in norms.items() if which in ("", key)
        ]  # fmt: skip
        for module in modules:
            module.forward = MethodType(planted.norm_with({bug}), module)
        return
    layer = peer.model.layers[place]
    if bug == "C1":
        layer.mlp.act_fn = torch.nn.GELU()
    elif bug == "C2":
        layer.mlp.act_fn = torch.nn.SiLU()
    elif bug == "C3":
        layer.mlp.forward = MethodType(planted.mlp_on_up, layer.mlp)
    elif bug == "C3 weights":
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
    elif bug == "C3 reshaped":
        weight = layer.mlp.gate_proj.weight.detach()
        layer.mlp.gate_proj.weight = torch.nn.Parameter(weight.reshape(weight.shape[::-1]).T.contiguous())
    elif bug == "E2":
        layer.self_attn.scaling = (config.hidden_size / config.layers[0].num_heads) ** -0.5
    elif bug == "scaled":  # known to nobody
        layer.mlp.down_proj.register_forward_hook(lambda _, args, out: out * 1.001)
    elif bug == "scaled norm":
        layer.input_layernorm.register_forward_hook(lambda _, args, out: out * 1.001)
    else:
        raise ValueError(f"no such bug: {bug}")


def in_calls(module, name, wrong, layers, calls):
    """Patch of a function that every layer calls so often: another one in some layers."""
    right, count = getattr(module, name), iter(range(10**6))

    def either(*args, **kwargs):
        return (wrong if next(count) // calls in layers else right)(*args, **kwargs)

    return mock.patch.object(module, name, either)
