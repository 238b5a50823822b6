"""google-deepmind/gemma's own Flax code in bfloat16, operation by operation, with every named tensor recorded.

Nothing of it is replaced: modules are watched through Flax's interceptor, and the functions between them through
wrappers that call the originals. Not jitted, so that each operation rounds as its dtype says.
"""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from gemma import modules, positional_embeddings, transformer


def flax_model(config):
    """Transformer of Gemma 1 with the sizes of a `refgemma.Config`."""
    own = transformer.TransformerConfig.gemma_2b(cache_size=None)
    sizes = {
        "num_layers": config.num_layers,
        "num_embed": config.vocab_size,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.layers[0].intermediate_size,
        "num_heads": config.layers[0].num_heads,
        "num_kv_heads": config.layers[0].num_kv_heads,
        "head_dim": config.layers[0].head_dim,
        "attention_types": (modules.AttentionType.GLOBAL,) * config.num_layers,
    }
    return transformer.Transformer(dataclasses.replace(own, **sizes))


def flax_params(params, config):
    """Our parameters under the names, and in the axes, of a Flax checkpoint, in bfloat16."""
    N, K, H, D = (
        config.layers[0].num_heads,
        config.layers[0].num_kv_heads,
        config.layers[0].head_dim,
        config.hidden_size,
    )

    def narrow(array):
        return jnp.asarray(np.ascontiguousarray(array), jnp.bfloat16)

    tree = {
        "embedder": {"input_embedding": narrow(params["embed"])},
        "final_norm": {"scale": narrow(params["final_norm"])},
    }
    for i, layer in enumerate(params["layers"]):
        attn, mlp = layer["attn"], layer["mlp"]
        q, k, v = (attn[name].reshape(-1, H, D).swapaxes(1, 2) for name in "qkv")  # NDH, KDH
        if N == K:
            projections = {"qkv_einsum": {"w": narrow(np.stack([q, k, v]))}}
        else:
            projections = {"q_einsum": {"w": narrow(q)}, "kv_einsum": {"w": narrow(np.stack([k, v]))}}
        tree[f"layer_{i}"] = {
            "pre_attention_norm": {"scale": narrow(attn["norm"])},
            "pre_ffw_norm": {"scale": narrow(mlp["norm"])},
            "attn": {
                **projections,
                "attn_vec_einsum": {"w": narrow(attn["out"].T.reshape(N, H, D))},
            },
            "mlp": {
                "gating_einsum": narrow(np.stack([mlp["gate"].T, mlp["up"].T])),
                "linear": narrow(mlp["down"].T),
            },
        }
    return {"params": tree}


def record(params, config, tokens, positions):
    """Every tensor that `refgemma.model.forward` names, in its axes, as float32 arrays."""
    seen = {}
    at = ""

    def keep(name, value):
        seen[name] = np.array(value.astype(jnp.float32))

    def watch(next_function, args, kwargs, context):
        nonlocal at
        path, method = context.module.path, context.method_name
        if path and path[0].startswith("layer_"):
            at = f"layers.{path[0].removeprefix('layer_')}."
        out = next_function(*args, **kwargs)
        where = path[1:] if path and path[0].startswith("layer_") else path
        if method == "encode":
            keep("embed", out)
        elif method == "decode":
            keep("logits", out)
        elif method != "__call__":
            pass
        elif where == ("final_norm",):
            keep("final_norm", out)
        elif path and where == ():
            keep(at + "out", out[1])
        elif where == ("pre_attention_norm",):
            keep(at + "attn.norm", out)
        elif where == ("attn", "q_einsum"):
            keep(at + "attn.q", out)
        elif where == ("attn", "kv_einsum"):
            keep(at + "attn.k", out[0])
            keep(at + "attn.v", out[1])
        elif where == ("attn", "qkv_einsum"):
            for name, value in zip("qkv", out, strict=True):
                keep(at + f"attn.{name}", value)
        elif where == ("attn", "attn_vec_einsum"):
            keep(at + "attn.mix", args[1])
            keep(at + "attn.out", out)
        elif where == ("pre_ffw_norm",):
            keep(at + "attn.residual", args[0])
            keep(at + "mlp.norm", out)
        elif where == ("mlp",):
            keep(at + "mlp.down", out)
        return out

    turn, gelu, softmax, einsum = positional_embeddings.apply_rope, nn.gelu, jax.nn.softmax, jnp.einsum

    def watched_turn(inputs, *args, **kwargs):
        out = turn(inputs, *args, **kwargs)
        keep(at + ("attn.k_rope" if at + "attn.q_rope" in seen else "attn.q_rope"), out)  # queries come first
        return out

    def watched_softmax(scores, **kwargs):
        out = softmax(scores, **kwargs)
        keep(at + "attn.scores", scores.swapaxes(1, 2))  # BTNS there; what the mask hides is of no account
        keep(at + "attn.probs", out.swapaxes(1, 2))
        return out

    def watched_gelu(gate):
        out = gelu(gate)
        keep(at + "mlp.gate", gate)
        keep(at + "mlp.act", out)
        return out

    def watched_einsum(equation, x, w):
        out = einsum(equation, x, w)
        if equation == "...F,NFH->...NH":
            keep(at + "mlp.up", out[..., 1, :])
        elif equation == "...H,HF->...F":
            keep(at + "mlp.gated", x)
        return out

    T = tokens.shape[1]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (len(tokens), T, T))
    with (
        mock.patch.object(positional_embeddings, "apply_rope", watched_turn),
        mock.patch.object(nn, "gelu", watched_gelu),
        mock.patch.object(jax.nn, "softmax", watched_softmax),
        mock.patch.object(jnp, "einsum", watched_einsum),
        nn.intercept_methods(watch),
    ):
        flax_model(config).apply(flax_params(params, config), jnp.asarray(tokens), jnp.asarray(positions), None, mask)
    return seen


def jitted_logits(params, config, tokens, positions):
    """Logits of the same model compiled whole."""
    T = tokens.shape[1]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (len(tokens), T, T))
    run = jax.jit(lambda p, t, at, m: flax_model(config).apply(p, t, at, None, m)[0])
    out = run(flax_params(params, config), jnp.asarray(tokens), jnp.asarray(positions), mask)
    return np.asarray(out.astype(jnp.float32))
