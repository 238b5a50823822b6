"""Another engine's trace, read as ours: names recognised, axes brought into our order, and every step of it said.

What a name or a shape does not tell is left out and listed, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from refgemma.config import Config
from refgemma.errors import InputError, grouped, listed
from refgemma.files.arrays import LazyArrays, StoredArray, read_arrays
from refgemma.numerics import Array
from refgemma.oracle.foreign.axes import said
from refgemma.oracle.foreign.names import Match, mapped, match, only_some_layers
from refgemma.oracle.foreign.placing import NUMBERS, Placed, Settled, maker, place, settled
from refgemma.oracle.foreign.tokens import foreign_tokens, is_tokens
from refgemma.oracle.operations import axes_of, names_of, sizes_of
from refgemma.oracle.traces.trace import Trace

_CUT = ("final_norm", "logits")  # what engines compute of the last position alone


def read_foreign(
    path: str | Path,
    config: Config,
    *,
    mapping: Mapping[str, str] | None = None,
    tokens: ArrayLike | None = None,
    positions: ArrayLike | None = None,
) -> Trace:
    """Read the tensors that another engine dumped.

    Parameters
    ----------
    path : str or Path
        ``.safetensors``, ``.npz``, or ``.npy``: logits alone.
    config : Config
        The model that it ran.
    mapping : mapping of str to str, optional
        Its names to ours; ``{i}`` in both stands for the layer. Names that are not in it are recognised as usual.
    tokens, positions : array_like of int, shape (T,) or (B, T), optional
        What it ran, where the file does not say.

    Returns
    -------
    Trace
        Tensors are read, and brought into our axes, when they are asked for. `Trace.notes` says what was done.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, is about other tokens, or holds nothing that is recognised.
    """
    path = Path(path)
    arrays = _unstacked(read_arrays(path), config)
    ids, places, notes = foreign_tokens(
        path,
        arrays,
        config,
        None if tokens is None else np.atleast_2d(np.asarray(tokens)),
        None if positions is None else np.atleast_2d(np.asarray(positions)),
    )
    matches = {name: found for name in arrays if (found := match(name, config)) is not None and not is_tokens(name)}
    if mapping:
        matches |= mapped(mapping, list(arrays), config)
        notes += only_some_layers(mapping, list(arrays), config)
    nameless = [name for name in arrays if name not in matches and not is_tokens(name)]
    if _one_too_many(arrays, matches, sizes_of(config, *ids.shape)):
        T = ids.shape[1]
        fed = f"{T - 1} positions were fed, {T} tokens given"
        if tokens is not None:
            raise InputError(f"{path}: {fed}: give the tokens that were fed")
        ids, places = ids[:, :-1], places[:, :-1]
        notes.append(f"{fed}: the last, which an engine that generates draws and does not feed, is left out")
    sizes = sizes_of(config, *ids.shape)
    chosen, misfits = place(arrays, matches, sizes)
    ends, other_misfits = place(arrays, matches, sizes | {"T": 1}) if sizes["T"] > 1 else ({}, {})
    last = set(chosen) <= set(_CUT) and bool(ends) and len(other_misfits) < len(misfits)
    if last:
        notes.append("holds the last position of each row only")
        chosen, ends, misfits = ends, {}, other_misfits
    else:  # engines that generate compute the logits of one position alone
        ends = {name: placed for name, placed in ends.items() if name in _CUT and name not in chosen}
    several = {} if (places[:, -1] < 0).any() else _last_few(arrays, matches, sizes, {*chosen, *ends})
    ends |= several
    misfits = {name: line for name, line in misfits.items() if name not in {one.theirs for one in ends.values()}}
    if unfit := [line for name, line in misfits.items() if matches[name].rank == 0]:
        raise InputError(f"{path}: a line of the mapping does not fit: {unfit[0]}")
    if not chosen and not several:
        raise InputError(f"{path} holds no tensor that is recognised: {_why_none(list(misfits.values()), nameless)}")

    last = last or not chosen
    layout = settled(chosen) | settled(ends)
    notes += _read_as(chosen, layout, sizes["V"])
    for name, placed in ends.items():
        which = f"the last {placed.sizes['T']} positions" if name in several else "the last position only"
        notes += [f"{line}; of {which}" for line in _read_as({name: placed}, layout, sizes["V"], all_of_them=True)]
    notes += [f"left out: {text}" for text in grouped(list(misfits.values()))]
    if nameless := grouped([name for name in nameless if arrays[name].dtype in NUMBERS]):
        notes.append(f"left out, no known name: {listed(nameless)}")
    given = dict(sorted((chosen | ends).items(), key=lambda one: names_of(config).index(one[0])))
    return Trace(
        LazyArrays({name: maker(name, placed, layout[name].layout, sizes) for name, placed in given.items()}),
        {name: placed.array.dtype for name, placed in given.items()},
        ids,
        places,
        config,
        {"file": path.name} | ({"last": "true"} if last else {}),
        tuple(notes),
        frozenset() if last else frozenset(ends),
    )


def _one_too_many(arrays: Mapping[str, StoredArray], matches: Mapping[str, Match], sizes: dict[str, int]) -> bool:
    """Whether all tensors but those that are cut are of one position less than there are tokens."""
    T = sizes["T"]
    inner = {name: found for name, found in matches.items() if not set(found.ours) <= set(_CUT)}
    if T < 3 or not inner or place(arrays, inner, sizes)[0]:
        return False
    fitting, misfits = place(arrays, inner, sizes | {"T": T - 1, "S": T - 1})
    return bool(fitting) and not misfits


def _last_few(
    arrays: Mapping[str, StoredArray], matches: Mapping[str, Match], sizes: dict[str, int], placed: set[str]
) -> dict[str, Placed]:
    """Of what engines compute of the last position alone: those that they gave of the last few, more than one."""
    cut = {name: found for name, found in matches.items() if set(found.ours) <= {*_CUT} - placed}
    counts = {n for name in cut for n in arrays[name].shape if 1 < n < sizes["T"]}
    found: dict[str, Placed] = {}
    for n in sorted(counts):
        found = place(arrays, cut, sizes | {"T": n})[0] | found
    return found


def _unstacked(arrays: Mapping[str, StoredArray], config: Config) -> dict[str, StoredArray]:
    """Arrays, where the streams or probabilities of all layers in one have become one a layer."""
    found: dict[str, StoredArray] = {}
    for name, array in arrays.items():
        word = re.split(r"[./]", name)[-1]
        count = {"hidden_states": config.num_layers + 1, "attentions": config.num_layers}.get(word)
        if count is None or len(array.shape) < 3 or array.shape[0] != count:
            found[name] = array
            continue
        for i in range(count):
            entry = StoredArray(f"{name}.{i}", array.dtype, array.shape[1:], partial(_entry, array, i))
            found[entry.name] = entry
    return found


def _entry(array: StoredArray, i: int) -> Array:
    part: Array = array.read()[i]
    return part


def _read_as(
    chosen: Mapping[str, Placed], layouts: Mapping[str, Settled], vocabulary: int, all_of_them: bool = False
) -> list[str]:
    """A line for each kind of tensor: whose name, which axes."""
    lines = []
    for ours, placed in chosen.items():
        layout, open_choice = layouts[ours]
        axes = axes_of(ours)
        text = f"{placed.theirs} is {ours}" if placed.theirs != ours else ours
        steps = ["a part of it"] if placed.part else []
        if done := said(layout, axes):
            steps.append(done)
        if placed.sizes["S"] > placed.sizes["T"] and "S" in axes and placed.sizes["T"] > 1:
            steps.append("keys beyond the tokens cut off")
        if "V" in axes and placed.sizes["V"] > vocabulary:
            steps.append(f"columns beyond the vocabulary of {vocabulary} cut off")
        if open_choice:
            steps.append("sizes coincide, so other axes are possible")
        if placed.rank == 4:
            steps.append("taken as already scaled by sqrt(D); map another tensor to 'embed' if the engine scales later")
        if steps or placed.theirs != ours or all_of_them:
            lines.append("; ".join([text, *steps]))
    return grouped(lines)


def _why_none(misfits: list[str], nameless: list[str]) -> str:
    if misfits:
        return misfits[0]
    return f"it has {listed(nameless)}; a mapping file says which is which" if nameless else "it has none"
