"""The parameters of a model by path, such as ``layers.3.attn.q``: look one up, and change some without the others."""

from __future__ import annotations

from typing import Any, cast

from refgemma.model import Params


def at(params: Params, path: str) -> Any:
    """Operand at a path."""
    node: Any = params
    for part in path.split("."):
        node = node[int(part) if part.isdigit() else part]
    return node


def branched(params: Params) -> Params:
    """Tree of its own for the same objects: what is put there is not in the old one."""
    layers = [{"attn": {**layer["attn"]}, "mlp": {**layer["mlp"]}} for layer in params["layers"]]
    return cast(Params, {**params, "layers": layers})


def put(tree: Params, path: str, operand: Any) -> None:
    """Set what stands at a path."""
    parent, _, last = path.rpartition(".")
    node: Any = at(tree, parent) if parent else tree
    node[last] = operand
