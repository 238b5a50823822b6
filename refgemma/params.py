"""The weights of a model: nested, named arrays, and the one way to walk them.

A path such as ``layers.3.attn.q`` names one weight. A layer has the parts that its entries name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypedDict, cast

from refgemma.numerics import Array
from refgemma.ops.linear import Operand


class AttentionParams(TypedDict):
    """Weights of one attention: its norm (D,), q (N H, D), k and v (K H, D), out (D, N H)."""

    norm: Array
    q: Operand
    k: Operand
    v: Operand
    out: Operand


class MlpParams(TypedDict):
    """Weights of one MLP: its norm (D,), gate and up (F, D), down (D, F)."""

    norm: Array
    gate: Operand
    up: Operand
    down: Operand


class LayerParams(TypedDict):
    """Weights of one layer."""

    attn: AttentionParams
    mlp: MlpParams


class Params(TypedDict):
    """All weights: embed (V, D), the layers, final_norm (D,), head (V, D); head is embed itself where they are tied."""

    embed: Operand
    layers: list[LayerParams]
    final_norm: Array
    head: Operand


def leaves(params: Params) -> Iterator[tuple[str, Any]]:
    """Path and weight of each; a tied head comes as well as the embedding."""

    def walk(path: str, node: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, (dict, list)):
            yield path, node
            return
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from walk(f"{path}.{key}" if path else str(key), child)

    return walk("", params)


def at(params: Params, path: str) -> Any:
    """The weight at a path."""
    node: Any = params
    for key in path.split("."):
        node = node[int(key) if key.isdigit() else key]
    return node


def build(weights: Mapping[str, Any]) -> Params:
    """A tree of weights by path."""
    tree: dict[str, Any] = {"layers": []}
    for path, weight in weights.items():
        node: Any = tree
        *parents, last = path.split(".")
        for key in parents:
            if isinstance(node, dict):
                node = node.setdefault(key, {})
            else:
                node.extend({} for _ in range(int(key) + 1 - len(node)))
                node = node[int(key)]
        node[last] = weight
    return cast(Params, tree)


def changed(params: Params, change: Callable[[str, Any], Any]) -> Params:
    """The tree with ``change(path, weight)`` in place of each weight; the old tree keeps its own."""
    return build({path: change(path, weight) for path, weight in leaves(params)})


def replaced(params: Params, weights: Mapping[str, Any]) -> Params:
    """The tree with other weights at some paths; the old tree keeps its own."""
    return build(dict(leaves(params)) | dict(weights))


def each_once(change: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
    """`change` for `changed`, called once for each object, so that a tied head stays tied."""
    done: dict[int, Any] = {}

    def once(path: str, weight: Any) -> Any:
        if id(weight) not in done:
            done[id(weight)] = change(weight)
        return done[id(weight)]

    return once
