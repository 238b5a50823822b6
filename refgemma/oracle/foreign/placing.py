"""Which foreign array is which of our tensors, and in which axes, by names that are recognised and by sizes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import NamedTuple, TypeAlias

import numpy as np

from refgemma.files.arrays import StoredArray
from refgemma.numerics import Array
from refgemma.oracle.foreign.axes import Layout, arrange, layouts, parts
from refgemma.oracle.foreign.names import Match
from refgemma.oracle.operations import axes_of, split_name

Index: TypeAlias = tuple[int | slice | EllipsisType, ...]

_PADDING = 1024  # rows at most; Flax checkpoints of Gemma 1 have 256128 for 256000

NUMBERS = ("float16", "bfloat16", "float32", "float64")


class Placed(NamedTuple):
    """A foreign array, or a part of one, that may be one of our tensors; several `options` where sizes coincide."""

    theirs: str
    array: StoredArray
    part: Index
    rank: int  # as in `Match`
    options: list[Layout]
    sizes: dict[str, int]


class Settled(NamedTuple):
    """The layout that a tensor is read in, and whether sizes leave others open."""

    layout: Layout
    open: bool


def place(
    arrays: Mapping[str, StoredArray], matches: Mapping[str, Match], sizes: dict[str, int]
) -> tuple[dict[str, Placed], dict[str, str]]:
    """Find the best array for each of our tensors."""
    chosen: dict[str, Placed] = {}
    misfits = {}
    for name, found in matches.items():
        array = arrays[name]
        if array.dtype not in NUMBERS:
            misfits[name] = f"{name} is {array.dtype}, expected {', '.join(NUMBERS)}"
            continue
        placed = _options(array, found, sizes)
        if not placed:
            want = " or ".join(str(tuple(sizes[c] for c in axes_of(ours))) for ours in found.ours)
            misfits[name] = f"{name} has shape {array.shape}, {' '.join(found.ours)} needs {want}"
        for ours, candidate in placed.items():
            if ours not in chosen or candidate.rank < chosen[ours].rank:
                chosen[ours] = candidate
    return chosen, misfits


def _options(array: StoredArray, found: Match, sizes: dict[str, int]) -> dict[str, Placed]:
    """How an array may be read as the tensors that its name stands for."""

    def fits(ours: str, shape: tuple[int, ...], part: Index = ()) -> Placed | None:
        axes = axes_of(ours)
        own = sizes
        options = layouts(shape, axes, sizes)
        if not options and "S" in axes and shape and shape[-1] > sizes["S"]:  # a cache with room to spare
            own = sizes | {"S": shape[-1]}
            options = layouts(shape, axes, own)
        if not options and "V" in axes and shape and _padded(shape[-1], sizes):
            own = sizes | {"V": shape[-1]}
            options = layouts(shape, axes, own)
        return Placed(array.name, array, part, found.rank, options, own) if options else None

    alone = {ours: placed for ours in found.ours if (placed := fits(ours, array.shape)) is not None}
    if len(found.ours) == 1 or len(alone) == 1:
        return alone
    together = {}
    for ours, part in zip(found.ours, parts(array.shape, [axes_of(o) for o in found.ours], sizes), strict=False):
        placed = fits(ours, np.broadcast_to(0, array.shape)[part].shape, part)
        if placed is not None:
            together[ours] = placed
    return together if len(together) == len(found.ours) else {}


def _padded(columns: int, sizes: Mapping[str, int]) -> bool:
    """Whether logits have the columns of a table that was padded to a round number of rows, and are not the stream."""
    return 0 < columns - sizes["V"] <= _PADDING and columns != sizes["D"]


def settled(chosen: Mapping[str, Placed]) -> dict[str, Settled]:
    """One layout a tensor: where sizes coincide, that of its fellows, of other layers say, whose sizes do not."""
    fellows: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, placed in chosen.items():
        if len(placed.options) == 1:
            fellows[_fellowship(name)][_pattern(placed.options[0])] += 1
    found = {}
    for name, placed in chosen.items():
        usual = [option for option in placed.options if _pattern(option) in fellows[_fellowship(name)]]
        found[name] = Settled((usual or placed.options)[0], len(usual or placed.options) > 1)
    return found


def _fellowship(name: str) -> str:
    """Tensors that an engine lays out in one way: queries, keys and values; the same of all layers."""
    _, kind = split_name(name)
    return re.sub(r"attn\.[qkv](?=$|_)", "attn.heads", kind)


def _pattern(layout: Layout) -> str:
    """Layout, whichever heads it is about."""
    return " ".join(layout).replace("K", "N")


def maker(name: str, placed: Placed, layout: Layout, sizes: Mapping[str, int]) -> Callable[[], Array]:
    """Say how one of our tensors is made from a foreign array."""

    def make() -> Array:
        whole = arrange(placed.array.read()[placed.part], layout, axes_of(name), placed.sizes)
        return whole[..., : sizes[axes_of(name)[-1]]]

    return make
