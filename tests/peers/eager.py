"""transformers' own Gemma with eager attention, in float32 as it is, and in float64 with its narrow spots widened.

Even after `.double()` it narrows to float32 in four places: norm, rope table, softmax and embedding scale. `widen`
replaces those four by the same formulas in float64, and nothing else.
"""

import math

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma.configuration_gemma import GemmaConfig

from tests.models import hf_config, hf_tensors


def eager_model(model, *, float64=False):
    """GemmaForCausalLM with the weights of a `tests.models.Model`."""
    fields = hf_config(model.config)
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    own = {name: value for name, value in fields.items() if name not in ("architectures", "model_type")}
    peer = modeling_gemma.GemmaForCausalLM(GemmaConfig(**own, rope_parameters=rope, attn_implementation="eager")).eval()
    tensors = {name: torch.from_numpy(array) for name, array in hf_tensors(model.params).items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    peer.load_state_dict(tensors, strict=True)
    return widen(peer.double()) if float64 else peer


def eager_logits(peer, tokens, positions):
    """Logits (B, T, V); whatever they are at padding."""
    real = positions >= 0
    with torch.no_grad():
        return peer(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            position_ids=torch.from_numpy(np.where(real, positions, 0)),
            use_cache=False,
        ).logits.numpy()


def widen(peer):
    """Replace, in place, what stays in float32 after `.double()`."""
    body = peer.model
    body.embed_tokens.embed_scale = torch.tensor(math.sqrt(peer.config.hidden_size), dtype=torch.float64)
    body.rotary_emb = WideRope(peer.config)
    body.norm = WideNorm(body.norm)
    for layer in body.layers:
        layer.input_layernorm = WideNorm(layer.input_layernorm)
        layer.post_attention_layernorm = WideNorm(layer.post_attention_layernorm)
    peer.config._attn_implementation = "eager_float64"
    return peer


class WideNorm(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


class WideRope(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        lane = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
        self.inv_freq = 1.0 / config.rope_parameters["rope_theta"] ** (lane / config.head_dim)

    def forward(self, x, position_ids):
        angle = position_ids[..., None].double() * self.inv_freq
        both = torch.cat((angle, angle), dim=-1)
        return both.cos(), both.sin()


def wide_attention(module, query, key, value, attention_mask, scaling, **_):
    key = modeling_gemma.repeat_kv(key, module.num_key_value_groups)
    value = modeling_gemma.repeat_kv(value, module.num_key_value_groups)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probs = torch.softmax(scores, dim=-1)
    return (probs @ value).transpose(1, 2).contiguous(), probs


AttentionInterface.register("eager_float64", wide_attention)
AttentionMaskInterface.register("eager_float64", eager_mask)
