"""Trees of parameters put side by side: each row of a batch computes with the adapter of its own tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from refgemma.errors import InputError
from refgemma.model import Params
from refgemma.numerics import Array, namespace_of
from refgemma.ops.linear import Adapted, Delta


def for_rows(base: Params, own: Sequence[Params]) -> Params:
    """Parameters for a batch in which every row has its own adapter, or none."""
    trees = list({id(tree): tree for tree in own}.values())
    if len(trees) == 1:
        return trees[0]
    xp = namespace_of(base["final_norm"])
    rows = [xp.asarray([mine is tree for mine in own]) for tree in trees]
    return cast(Params, _together("", base, trees, rows))


def _together(path: str, base: Any, trees: list[Any], rows: list[Array]) -> Any:
    if isinstance(base, dict):
        return {name: _together(f"{path}.{name}", base[name], [tree[name] for tree in trees], rows) for name in base}
    if isinstance(base, list):
        return [_together(f"{path}.{i}", base[i], [tree[i] for tree in trees], rows) for i in range(len(base))]
    if all(tree is base for tree in trees):
        return base
    weight, common = (base.base, base.deltas) if isinstance(base, Adapted) else (base, ())
    deltas: list[Delta] = list(common)
    for changed, mask in zip(trees, rows, strict=True):
        if changed is base:
            continue
        if not isinstance(changed, Adapted) or changed.base is not weight:
            raise InputError(
                f"an adapter holds {path[1:]} trained whole: it cannot share a batch with rows that do without"
            )
        deltas += [replace(delta, rows=mask) for delta in changed.deltas[len(common) :]]
    return Adapted(weight, tuple(deltas))
