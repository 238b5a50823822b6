"""Random small models whose sizes and weights make mistakes visible.

H is never D / N, the widths D, F, N*H and K*H all differ, sqrt(D) is not a bfloat16 number, K = 1, K = N and
1 < K < N come in turn. Weights are large enough that norms, GELU and softmax bite and that logits span more than 10;
some tokens are so quiet that eps matters; rows are ragged, padded on either side, and some start far from position 0.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from refgemma.config import Config, from_json, to_json

HEADS = (  # (N, K), a third each: K = 1, K = N, 1 < K < N
    ((2, 1), (3, 1), (4, 1), (6, 1), (8, 1)),
    ((2, 2), (3, 3), (4, 4), (5, 5), (8, 8)),
    ((4, 2), (6, 2), (6, 3), (8, 2), (8, 4)),
)


@dataclass(frozen=True)
class Model:
    """A random model and a padded batch for it."""

    seed: int
    config: Config
    params: dict
    tokens: np.ndarray  # BT
    positions: np.ndarray  # BT, -1 at padding

    @property
    def real(self):
        """Where there is a token, BT."""
        return self.positions >= 0


def reshaped(config, **changes):
    """The same model with other numbers, of the whole or of every layer."""
    return from_json(to_json(config) | changes)


def random_model(seed, **fixed):
    """Model number `seed`; `fixed` overrides drawn sizes (num_tokens, or a field of Config)."""
    rng = np.random.default_rng([20240221, seed])
    config = random_config(rng, seed % 3, **{k: v for k, v in fixed.items() if k != "num_tokens"})
    params = random_params(rng, config)
    tokens, positions = random_batch(rng, config, fixed.get("num_tokens", int(rng.integers(2, 65))))
    return Model(seed, config, params, tokens, positions)


def random_config(rng, kind, **fixed):
    """Sizes that expose; `kind` picks the third of `HEADS`."""
    while True:
        N, K = HEADS[kind][rng.integers(len(HEADS[kind]))]
        D, H = int(rng.integers(24, 201)), 2 * int(rng.integers(4, 33))
        config = Config.uniform(
            **{
                "vocab_size": int(rng.integers(40, 131)),
                "hidden_size": D,
                "intermediate_size": int(rng.integers(D // 2, 3 * D)),
                "num_layers": int(rng.integers(1, 5)),
                "num_heads": N,
                "num_kv_heads": K,
                "head_dim": H,
                "max_positions": 8192,
                "rope_theta": 10_000.0,
                "rms_norm_eps": 1e-6,
                "query_scale": H**-0.5,
                "tie_word_embeddings": True,
            }
            | fixed
        )
        D, N, K, H = (
            config.hidden_size,
            config.layers[0].num_heads,
            config.layers[0].num_kv_heads,
            config.layers[0].head_dim,
        )
        widths = {D, config.layers[0].intermediate_size, N * H, config.vocab_size} | ({K * H} if K < N else set())
        exact_root = np.float32(D**0.5).view(np.uint32) & 0xFFFF == 0  # sqrt(D) is a bfloat16 number
        if D != N * H and len(widths) == 4 + (K < N) and not exact_root:
            return config


def random_params(rng, config):
    """Parameters in float32, nested as `refgemma` wants them."""
    D, F, H = config.hidden_size, config.layers[0].intermediate_size, config.layers[0].head_dim
    N, K, V = config.layers[0].num_heads, config.layers[0].num_kv_heads, config.vocab_size

    def matrix(rows, columns, gain):  # turns vectors of rms 1 into vectors of rms `gain`
        return (rng.normal(size=(rows, columns)) * gain / columns**0.5).astype(np.float32)

    def gain_of_norm():
        return (rng.normal(size=D) * 0.4).astype(np.float32)

    embed = matrix(V, D, 3.0)  # scaled by sqrt(D): a stream of rms 3; as the head: logits of standard deviation 3
    embed[rng.permutation(V)[: V // 8]] *= 1e-3  # a mean square of 1e-5, where eps = 1e-6 counts
    layers = [
        {
            "attn": {
                "norm": gain_of_norm(),
                "q": matrix(N * H, D, 1.5),
                "k": matrix(K * H, D, 1.5),
                "v": matrix(K * H, D, 1.5),
                "out": matrix(D, N * H, 1.5),
            },
            "mlp": {
                "norm": gain_of_norm(),
                "gate": matrix(F, D, 1.5),
                "up": matrix(F, D, 1.5),
                "down": matrix(D, F, 1.5),
            },
        }
        for _ in range(config.num_layers)
    ]
    return {"embed": embed, "layers": layers, "final_norm": gain_of_norm(), "head": embed}


def random_batch(rng, config, T):
    """One to four ragged rows: tokens (B, T) and positions (B, T), the first row full, padding on a side by chance."""
    B = int(rng.integers(1, 5))
    tokens = rng.integers(0, config.vocab_size, size=(B, T))
    positions = np.full((B, T), -1)
    far = rng.random() < 1 / 3  # a third of the batches start where bfloat16 cannot count, as later chunks of a text do
    for b in range(B):
        length = T if b == 0 else int(rng.integers(1, T + 1))
        start = int(rng.integers(257, 2000)) if far else 0
        first = T - length if rng.random() < 0.5 else 0
        positions[b, first : first + length] = start + np.arange(length)
    return tokens, positions


def map_params(change, params):
    """Params with `change` applied to every array; a head tied to the embedding stays tied."""
    layers = [
        {part: {name: change(w) for name, w in weights.items()} for part, weights in layer.items()}
        for layer in params["layers"]
    ]
    embed = change(params["embed"])
    head = embed if params["head"] is params["embed"] else change(params["head"])
    return {"embed": embed, "layers": layers, "final_norm": change(params["final_norm"]), "head": head}


def widened(params):
    """The same numbers in float64, as the float64 forward wants them."""
    return map_params(lambda w: w.astype(np.float64), params)


def digest(model):
    """First 16 hex digits of the SHA-256 of a model's arrays: tells whether a stored figure is about this model."""
    sha = hashlib.sha256()
    map_params(lambda w: sha.update(w.tobytes()), model.params)
    sha.update(model.tokens.astype(np.int64).tobytes() + model.positions.astype(np.int64).tobytes())
    return sha.hexdigest()[:16]


def hf_config(config):
    """Fields of a Hugging Face config.json."""
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.layers[0].intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.layers[0].num_heads,
        "num_key_value_heads": config.layers[0].num_kv_heads,
        "head_dim": config.layers[0].head_dim,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.layers[0].rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


def hf_tensors(params):
    """The same arrays under the names of a Hugging Face checkpoint; a tied head is left out, as it is there."""
    tensors = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["final_norm"]}
    for i, layer in enumerate(params["layers"]):
        attn, mlp = layer["attn"], layer["mlp"]
        tensors |= {
            f"model.layers.{i}.input_layernorm.weight": attn["norm"],
            f"model.layers.{i}.self_attn.q_proj.weight": attn["q"],
            f"model.layers.{i}.self_attn.k_proj.weight": attn["k"],
            f"model.layers.{i}.self_attn.v_proj.weight": attn["v"],
            f"model.layers.{i}.self_attn.o_proj.weight": attn["out"],
            f"model.layers.{i}.post_attention_layernorm.weight": mlp["norm"],  # its place is before the MLP
            f"model.layers.{i}.mlp.gate_proj.weight": mlp["gate"],
            f"model.layers.{i}.mlp.up_proj.weight": mlp["up"],
            f"model.layers.{i}.mlp.down_proj.weight": mlp["down"],
        }
    if params["head"] is not params["embed"]:
        tensors["lm_head.weight"] = params["head"]
    return tensors
