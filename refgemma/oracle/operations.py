"""The one table of operations: every named tensor of a run, what it is made from, by which formula, with which weight.

The names are those that `refgemma.model.forward` calls its tap with. Everything else in the oracle that depends on the
structure of the model (bounds, where bugs are, traces, test vectors) reads this table. A new operation needs a line on
the page of the model, its function in `refgemma.ops`, a row here, and a bound.

Letters: B batch row, T query position, S key position, D residual stream, N query heads, K key/value heads, H head
width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from refgemma.config import Config, axis_sizes
from refgemma.errors import InputError
from refgemma.params import Params


class Operation(NamedTuple):
    """One operation of the model."""

    name: str  # of its result; in a layer, without "layers.{i}."
    axes: str  # of its result
    made_from: tuple[str, ...]  # names in the same layer; "stream": what enters the layer, or leaves the last one
    kind: str  # of formula and of bound: a key of `KINDS`
    formula: str
    weight: str = ""  # path in the params of the layer, or of the model
    bugs_read: tuple[str, ...] = ()  # what some known bug makes it from as well
    needs: str = ""  # path in the params of the layer without which it does not have this operation


# In words; `refgemma.oracle.bounds.flow` has a bound for each.
KINDS = {
    "embedding": "embedding, scaled",
    "norm": "RMS norm",
    "product": "projection",
    "rotation": "rotary embedding",
    "scores": "scores before the mask",
    "softmax": "softmax over the keys that a query sees, those of its position and before",
    "mix": "values mixed",
    "added": "residual add",
    "gelu": "GELU, tanh form",
    "gated": "product",
}
_NORM = "x / sqrt(mean(x^2) + eps) * (1 + w)"
_TURN = "lanes i and i + H/2 turned by position * theta^(-2 i / H)"
_GELU = "x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))"

# fmt: off
_FIRST = (
    Operation("embed", "BTD", ("tokens",), "embedding", "sqrt(D) table[token]", "embed"),
)
_IN_LAYER = (
    Operation("attn.norm", "BTD", ("stream",), "norm", _NORM, "attn.norm"),
    Operation("attn.q", "BTNH", ("attn.norm",), "product", "x W^T, then N heads of width H", "attn.q"),
    Operation("attn.k", "BTKH", ("attn.norm",), "product", "x W^T, then K heads of width H", "attn.k"),
    Operation("attn.v", "BTKH", ("attn.norm",), "product", "x W^T, then K heads of width H", "attn.v"),
    Operation("attn.q_rope", "BTNH", ("attn.q", "positions"), "rotation", _TURN),
    Operation("attn.k_rope", "BTKH", ("attn.k", "positions"), "rotation", "as for the queries"),
    Operation("attn.scores", "BNTS", ("attn.q_rope", "attn.k_rope"), "scores", "query_scale * q_n[t] . k_(n // G)[s]",
              bugs_read=("attn.k",)),
    Operation("attn.probs", "BNTS", ("attn.scores", "positions"), "softmax", "exp(s) / sum exp(s); 0 elsewhere"),
    Operation("attn.mix", "BTNH", ("attn.probs", "attn.v"), "mix", "sum_s p_n[t, s] v_(n // G)[s]"),
    Operation("attn.out", "BTD", ("attn.mix",), "product", "heads side by side, times W^T", "attn.out"),
    Operation("attn.residual", "BTD", ("stream", "attn.out"), "added", "x + y"),
    Operation("mlp.norm", "BTD", ("attn.residual",), "norm", _NORM, "mlp.norm"),
    Operation("mlp.gate", "BTF", ("mlp.norm",), "product", "x W^T", "mlp.gate"),
    Operation("mlp.up", "BTF", ("mlp.norm",), "product", "x W^T", "mlp.up"),
    Operation("mlp.act", "BTF", ("mlp.gate",), "gelu", _GELU, bugs_read=("mlp.up",)),
    Operation("mlp.gated", "BTF", ("mlp.act", "mlp.up"), "gated", "act * up", bugs_read=("mlp.gate",)),
    Operation("mlp.down", "BTD", ("mlp.gated",), "product", "x W^T", "mlp.down"),
    Operation("out", "BTD", ("attn.residual", "mlp.down"), "added", "x + y"),
)
_LAST = (
    Operation("final_norm", "BTD", ("stream",), "norm", _NORM, "final_norm"),
    Operation("logits", "BTV", ("final_norm",), "product", "x table^T", "head"),
)
# fmt: on

# By name, in the order of the computation.
FIRST = {row.name: row for row in _FIRST}
IN_LAYER = {row.name: row for row in _IN_LAYER}
LAST = {row.name: row for row in _LAST}
OPERATIONS = FIRST | IN_LAYER | LAST

_NUMBERED = re.compile(r"layers\.(0|[1-9]\d*)\.(.+)")


def names_of(config: Config, params: Params | None = None) -> list[str]:
    """Every tensor of a model, in the order of the computation; without `params`, every one that it may have."""
    layers = [
        f"layers.{i}.{name}"
        for i in range(config.num_layers)
        for name, row in IN_LAYER.items()
        if params is None or not row.needs or _at(params["layers"][i], row.needs) is not None
    ]
    return [*FIRST, *layers, *LAST]


def split_name(name: str) -> tuple[int | None, str]:
    """Layer of a tensor (None outside the layers), and its name in the table."""
    found = _NUMBERED.fullmatch(name)
    if found is not None and found[2] in IN_LAYER:
        return int(found[1]), found[2]
    if name in FIRST or name in LAST:
        return None, name
    known = ", ".join([*FIRST, *(f"layers.0.{row}" for row in IN_LAYER), *LAST])
    raise InputError(f"unknown tensor {name!r}: expected one of {known}")


def axes_of(name: str) -> str:
    """Axis letters of a tensor."""
    return OPERATIONS[split_name(name)[1]].axes


def sources(name: str, config: Config, *, of_bugs: bool = False) -> Iterator[str]:
    """Full names of the tensors that one is made from; of_bugs: by the model or by any known bug."""
    layer, own = split_name(name)
    row = OPERATIONS[own]
    before = (config.num_layers if layer is None else layer) - 1
    for source in row.made_from + (row.bugs_read if of_bugs else ()):
        if source == "stream":
            yield "embed" if before < 0 else f"layers.{before}.out"
        elif source in OPERATIONS:  # neither tokens nor positions
            yield source if layer is None else f"layers.{layer}.{source}"


def weight_of(name: str, params: Params) -> Any:
    """The weight that a tensor is made with, or None."""
    layer, own = split_name(name)
    return _at(params if layer is None else params["layers"][layer], OPERATIONS[own].weight)


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if tree is not None else None
    return tree


def sizes_of(config: Config, B: int, T: int, layer: int = 0) -> dict[str, int]:
    """Size of each axis of a tensor, in one layer."""
    return axis_sizes(config, layer) | {"B": B, "T": T, "S": T}


def shape_of(name: str, config: Config, B: int, T: int, *, last: bool = False, kept: int = 1) -> tuple[int, ...]:
    """Shape of a tensor; last: of its last `kept` positions only."""
    sizes = sizes_of(config, B, T, split_name(name)[0] or 0)
    return tuple(min(max(kept, 1), T) if last and axis == "T" else sizes[axis] for axis in axes_of(name))
