"""Which foreign array is which tensor, and in which axes, by names that are recognised and by sizes.

Axes are recognised by their sizes: a missing batch axis, heads joined with their width, axes in another order. A layout
is written as axis letters in the order of the foreign array, joined ones in parentheses: ``B N T H`` for heads before
positions, ``T (N H)`` for one row with heads side by side.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise, permutations
from types import EllipsisType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from refgemma.files.arrays import StoredArray
from refgemma.numerics import Array
from refgemma.oracle.foreign.names import Match
from refgemma.oracle.operations import axes_of, split_name

Index: TypeAlias = tuple[int | slice | EllipsisType, ...]

_PADDING = 1024  # rows at most; Flax checkpoints of Gemma 1 have 256128 for 256000

NUMBERS = ("float16", "bfloat16", "float32", "float64")

# Groups of axis letters, one group per axis of the foreign array: ("B", "T", "NH").
Layout: TypeAlias = tuple[str, ...]


def layouts(shape: tuple[int, ...], axes: str, sizes: Mapping[str, int]) -> list[Layout]:
    """Every layout that an array of this shape may have."""
    found: dict[str, Layout] = {}
    for groups in _groupings(axes, sizes):
        if len(groups) != len(shape):
            continue
        for order in permutations(groups):
            letters = "".join(order)
            fits = all(math.prod(sizes[c] for c in group) == n for group, n in zip(order, shape, strict=True))
            # Keys before queries is never meant, and where there are as many of both, shapes cannot tell.
            if fits and not ("S" in axes and 0 <= letters.find("S") < letters.find("T")):
                # The place of an axis of length 1 makes no difference.
                found.setdefault("".join(c for c in letters if sizes[c] > 1), order)
    return list(found.values())


def arrange(array: Array, layout: Layout, axes: str, sizes: Mapping[str, int]) -> Array:
    """Array in the order of `axes`."""
    letters = "".join(layout)
    split = array.reshape([sizes[c] for c in letters])
    order = [letters.index(c) for c in axes if c in letters]
    moved: Array = split.transpose(order)
    return moved.reshape([sizes[c] for c in axes])  # adds missing axes of length 1


def written(layout: Layout) -> str:
    """Layout as text."""
    return " ".join(group if len(group) == 1 else f"({' '.join(group)})" for group in layout)


def changes(layout: Layout, axes: str) -> str:
    """In words, what brings an array into the order of `axes`; empty for nothing."""
    letters = "".join(layout)
    done = []
    if missing := [c for c in axes if c not in letters]:
        done.append(f"{' and '.join(missing)} added")
    if any(len(group) > 1 for group in layout):
        done.append("heads split")
    if letters != "".join(c for c in axes if c in letters):
        done.append("axes transposed")
    return f"{', '.join(done)}: {written(layout)} read as {' '.join(axes)}" if done else ""


def parts(shape: tuple[int, ...], wanted: Sequence[str], sizes: Mapping[str, int]) -> list[Any]:
    """Index of each of several tensors in one array that joins them; empty if they do not fit."""
    widths = [math.prod(sizes[c] for c in axes if c not in "BT") for axes in wanted]
    if len(shape) >= 2 and shape[-1] == sum(widths):
        ends = list(accumulate(widths, initial=0))
        return [(Ellipsis, slice(begin, end)) for begin, end in pairwise(ends)]
    # Flax: (2, B, T, K, H) and (3, B, T, N, H) in attention, (B, T, 2, F) in the MLP.
    fitting = []
    for axis in (0, len(shape) - 2):
        rest = shape[:axis] + shape[axis + 1 :]
        if len(shape) >= 3 and shape[axis] == len(wanted):
            found = [layouts(rest, axes, sizes) for axes in wanted]
            if all(found):
                moved = sum(bool(changes(options[0], axes)) for options, axes in zip(found, wanted, strict=True))
                fitting.append((moved, [(slice(None),) * axis + (i,) for i in range(len(wanted))]))
    return min(fitting, key=lambda one: one[0])[1] if fitting else []  # whose other axes need the least change


def _groupings(axes: str, sizes: Mapping[str, int]) -> Iterator[Layout]:
    """The axes in order, with heads and widths joined or not, with and without axes B and T of length 1."""
    plain = tuple(axes)
    joined = (*plain[:-2], "".join(plain[-2:])) if axes.endswith("H") else None
    for groups in (plain, joined):
        if groups is not None:
            yield groups
            for missing in ("B", "T", "BT"):
                if all(sizes[c] == 1 for c in missing):
                    yield tuple(group for group in groups if group not in missing)


class Placed(NamedTuple):
    """A foreign array, or a part of one, that may be a tensor; several `options` where sizes coincide."""

    source: str  # name in the file
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
    """Find the best array for each tensor, and say why others do not fit."""
    chosen: dict[str, Placed] = {}
    misfits = {}
    for name, found in matches.items():
        array = arrays[name]
        if array.dtype not in NUMBERS:
            misfits[name] = f"{name} is {array.dtype}, expected {', '.join(NUMBERS)}"
            continue
        placed = _options(array, found, sizes)
        if not placed:
            want = " or ".join(str(tuple(sizes[c] for c in axes_of(tensor))) for tensor in found.tensors)
            misfits[name] = f"{name} has shape {array.shape}, {' '.join(found.tensors)} needs {want}"
        for tensor, option in placed.items():
            if tensor not in chosen or option.rank < chosen[tensor].rank:
                chosen[tensor] = option
    return chosen, misfits


def _options(array: StoredArray, found: Match, sizes: dict[str, int]) -> dict[str, Placed]:
    """How an array may be read as the tensors that its name stands for."""

    def fits(tensor: str, shape: tuple[int, ...], part: Index = ()) -> Placed | None:
        axes = axes_of(tensor)
        own = sizes
        options = layouts(shape, axes, sizes)
        if not options and "S" in axes and shape and shape[-1] > sizes["S"]:  # a cache with room to spare
            own = sizes | {"S": shape[-1]}
            options = layouts(shape, axes, own)
        if not options and "V" in axes and shape and _padded(shape[-1], sizes):
            own = sizes | {"V": shape[-1]}
            options = layouts(shape, axes, own)
        return Placed(array.name, array, part, found.rank, options, own) if options else None

    alone = {name: placed for name in found.tensors if (placed := fits(name, array.shape)) is not None}
    if len(found.tensors) == 1 or len(alone) == 1:
        return alone
    together = {}
    for tensor, part in zip(
        found.tensors, parts(array.shape, [axes_of(o) for o in found.tensors], sizes), strict=False
    ):
        placed = fits(tensor, np.broadcast_to(0, array.shape)[part].shape, part)
        if placed is not None:
            together[tensor] = placed
    return together if len(together) == len(found.tensors) else {}


def _padded(columns: int, sizes: Mapping[str, int]) -> bool:
    """Whether logits have the columns of a padded table, and are not the stream."""
    return 0 < columns - sizes["V"] <= _PADDING and columns != sizes["D"]


def settled(chosen: Mapping[str, Placed]) -> dict[str, Settled]:
    """One layout per tensor; where sizes coincide, that of related tensors, say of other layers, whose sizes differ."""
    related: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, placed in chosen.items():
        if len(placed.options) == 1:
            related[_family(name)][_pattern(placed.options[0])] += 1
    found = {}
    for name, placed in chosen.items():
        usual = [option for option in placed.options if _pattern(option) in related[_family(name)]]
        found[name] = Settled((usual or placed.options)[0], len(usual or placed.options) > 1)
    return found


def _family(name: str) -> str:
    """Tensors that an engine lays out in one way: queries, keys and values; the same of all layers."""
    _, kind = split_name(name)
    return re.sub(r"attn\.[qkv](?=$|_)", "attn.heads", kind)


def _pattern(layout: Layout) -> str:
    """Layout, with the heads of keys and of queries alike."""
    return " ".join(layout).replace("K", "N")


def maker(name: str, placed: Placed, layout: Layout, sizes: Mapping[str, int]) -> Callable[[], Array]:
    """Function that makes a tensor from a foreign array."""

    def make() -> Array:
        whole = arrange(placed.array.read()[placed.part], layout, axes_of(name), placed.sizes)
        return whole[..., : sizes[axes_of(name)[-1]]]

    return make
