"""The tensors of a trace: their names, which are those the tap of `refgemma.model.forward` is called with, and axes.

Letters: B batch row, T query position, S key position, D residual stream, N query heads, K key/value heads, H head
width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import re

from refgemma.config import Config
from refgemma.errors import InputError

# In the order of the computation.
FIRST = {"embed": "BTD"}
IN_LAYER = {
    "attn.norm": "BTD",
    "attn.q": "BTNH",
    "attn.k": "BTKH",
    "attn.v": "BTKH",
    "attn.q_rope": "BTNH",
    "attn.k_rope": "BTKH",
    "attn.scores": "BNTS",
    "attn.probs": "BNTS",
    "attn.mix": "BTNH",
    "attn.out": "BTD",
    "attn.residual": "BTD",
    "mlp.norm": "BTD",
    "mlp.gate": "BTF",
    "mlp.up": "BTF",
    "mlp.act": "BTF",
    "mlp.gated": "BTF",
    "mlp.down": "BTD",
    "out": "BTD",
}
LAST = {"final_norm": "BTD", "logits": "BTV"}

_LAYER = re.compile(r"layers\.(0|[1-9]\d*)\.(.+)")


def names_of(config: Config) -> list[str]:
    """Every tensor of a model, in the order of the computation."""
    layers = [f"layers.{i}.{name}" for i in range(config.num_layers) for name in IN_LAYER]
    return [*FIRST, *layers, *LAST]


def split_name(name: str) -> tuple[int | None, str]:
    """Layer and kind of a tensor."""
    found = _LAYER.fullmatch(name)
    if found is not None and found[2] in IN_LAYER:
        return int(found[1]), found[2]
    if name in FIRST or name in LAST:
        return None, name
    kinds = ", ".join([*FIRST, *(f"layers.0.{kind}" for kind in IN_LAYER), *LAST])
    raise InputError(f"{name!r} is the name of no tensor: there are {kinds}")


def axes_of(name: str) -> str:
    """Axis letters of a tensor."""
    _, kind = split_name(name)
    return (FIRST | IN_LAYER | LAST)[kind]


def sizes_of(config: Config, B: int, T: int) -> dict[str, int]:
    """Size of each axis."""
    return {
        "B": B,
        "T": T,
        "S": T,
        "D": config.hidden_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.intermediate_size,
        "V": config.vocab_size,
    }


def shape_of(name: str, config: Config, B: int, T: int, *, last: bool = False, kept: int = 1) -> tuple[int, ...]:
    """Shape of a tensor."""
    sizes = sizes_of(config, B, T)
    return tuple(min(max(kept, 1), T) if last and axis == "T" else sizes[axis] for axis in axes_of(name))
