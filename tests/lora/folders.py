"""Small adapters for a random model: names as PEFT writes them, numbers drawn."""

import numpy as np

from tests.lora.peft_folders import PREFIX, write_adapter
from tests.models import random_model

SETTINGS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 3,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "down_proj"],
}


def model():
    return random_model(2, num_layers=2, num_tokens=9)


def factors(m, rank=3, *, seed=0):
    """Tensors of an adapter for q_proj and down_proj in every layer."""
    rng = np.random.default_rng(seed)
    c = m.config
    shapes = {
        "self_attn.q_proj": (c.layers[0].num_heads * c.layers[0].head_dim, c.hidden_size),
        "mlp.down_proj": (c.hidden_size, c.layers[0].intermediate_size),
    }
    tensors = {}
    for i in range(c.num_layers):
        for part, (outputs, inputs) in shapes.items():
            name = f"{PREFIX}model.layers.{i}.{part}."
            tensors[name + "lora_A.weight"] = rng.normal(size=(rank, inputs)) * inputs**-0.5
            tensors[name + "lora_B.weight"] = rng.normal(size=(outputs, rank))
    return tensors


def write(folder, m, tensors=None, dtype="float64", **settings):
    """Folder of an adapter for `m`; `settings` replace fields of its configuration."""
    return write_adapter(folder, SETTINGS | settings, factors(m) if tensors is None else tensors, dtype)
