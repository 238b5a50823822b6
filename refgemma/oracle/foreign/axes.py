"""Axes told by their sizes: a missing batch axis, heads joined with their width, axes in another order.

A layout is written as our axis letters in the order of the foreign array, joined ones in parentheses: ``B N T H`` for
heads before positions, ``T (N H)`` for one row with heads side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise, permutations
from typing import Any, TypeAlias

from refgemma.numerics import Array

# Groups of axis letters, one an axis of the foreign array: ("B", "T", "NH").
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
            # Keys before queries is never meant, and where both are as many no shape tells.
            if fits and not ("S" in axes and 0 <= letters.find("S") < letters.find("T")):
                # Where an axis of one entry stands makes no difference.
                found.setdefault("".join(c for c in letters if sizes[c] > 1), order)
    return list(found.values())


def arrange(array: Array, layout: Layout, axes: str, sizes: Mapping[str, int]) -> Array:
    """Array in our axes."""
    letters = "".join(layout)
    split = array.reshape([sizes[c] for c in letters])
    order = [letters.index(c) for c in axes if c in letters]
    moved: Array = split.transpose(order)
    return moved.reshape([sizes[c] for c in axes])  # axes of one entry that were missing


def written(layout: Layout) -> str:
    """Layout as text."""
    return " ".join(group if len(group) == 1 else f"({' '.join(group)})" for group in layout)


def said(layout: Layout, axes: str) -> str:
    """What had to be done to an array, in words."""
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
    """Where each of several tensors lies in one array that joins them."""
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
                moved = sum(bool(said(options[0], axes)) for options, axes in zip(found, wanted, strict=True))
                fitting.append((moved, [(slice(None),) * axis + (i,) for i in range(len(wanted))]))
    return min(fitting, key=lambda one: one[0])[1] if fitting else []  # where the rest stands as it should


def _groupings(axes: str, sizes: Mapping[str, int]) -> Iterator[Layout]:
    """Our order, with neighbouring heads and widths joined or not, with and without axes B and T of one entry."""
    plain = tuple(axes)
    joined = (*plain[:-2], "".join(plain[-2:])) if axes.endswith("H") else None
    for groups in (plain, joined):
        if groups is not None:
            yield groups
            for missing in ("B", "T", "BT"):
                if all(sizes[c] == 1 for c in missing):
                    yield tuple(group for group in groups if group not in missing)
