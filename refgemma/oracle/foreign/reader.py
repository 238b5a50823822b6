"""Another engine's file, read as a trace: tensors, tokens and positions, with a note on every assumption.

What a name or a shape does not determine is left out and listed, never guessed.
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
from refgemma.oracle.foreign.axes import NUMBERS, Placed, Settled, changes, maker, place, settled
from refgemma.oracle.foreign.names import Match, mapped, match, only_some_layers
from refgemma.oracle.operations import axes_of, names_of, sizes_of
from refgemma.oracle.traces.trace import Trace, first_difference

_TOKENS = ("tokens", "input_ids", "token_ids", "ids", "input_tokens")
_POSITIONS = ("positions", "position_ids", "segment_pos")
_MASKS = ("attention_mask", "padding_mask", "input_mask")
_CUT = ("final_norm", "logits")  # what engines compute of the last position alone


def read_foreign(
    path: str | Path,
    config: Config,
    *,
    mapping: Mapping[str, str] | None = None,
    tokens: ArrayLike | None = None,
    positions: ArrayLike | None = None,
) -> Trace:
    """Read the tensors that another engine saved.

    Parameters
    ----------
    path : str or Path
        ``.safetensors``, ``.npz``, or ``.npy``: logits alone.
    config : Config
        The model that it ran.
    mapping : mapping of str to str, optional
        Names in the file to names of the reference; ``{i}`` in both is the layer. Other names are recognised as usual.
    tokens, positions : array_like of int, shape (T,) or (B, T), optional
        What was fed, where the file does not say.

    Returns
    -------
    Trace
        Tensors are read, and their axes rearranged, on access. `Trace.notes` says what was done.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, has other tokens, or holds nothing that is recognised.
    """
    path = Path(path)
    arrays = _unstacked(read_arrays(path), config)
    ids, places, notes = _fed(
        path,
        arrays,
        config,
        None if tokens is None else np.atleast_2d(np.asarray(tokens)),
        None if positions is None else np.atleast_2d(np.asarray(positions)),
    )
    matches = {name: found for name in arrays if (found := match(name, config)) is not None and not _is_tokens(name)}
    if mapping:
        matches |= mapped(mapping, list(arrays), config)
        notes += only_some_layers(mapping, list(arrays), config)
    nameless = [name for name in arrays if name not in matches and not _is_tokens(name)]
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
    misfits = {name: line for name, line in misfits.items() if name not in {one.source for one in ends.values()}}
    if unfit := [line for name, line in misfits.items() if matches[name].rank == 0]:
        raise InputError(f"{path}: an entry of the mapping does not fit: {unfit[0]}")
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
    """Whether all tensors but final norm and logits have one position less than there are tokens."""
    T = sizes["T"]
    inner = {name: found for name, found in matches.items() if not set(found.tensors) <= set(_CUT)}
    if T < 3 or not inner or place(arrays, inner, sizes)[0]:
        return False
    fitting, misfits = place(arrays, inner, sizes | {"T": T - 1, "S": T - 1})
    return bool(fitting) and not misfits


def _last_few(
    arrays: Mapping[str, StoredArray], matches: Mapping[str, Match], sizes: dict[str, int], placed: set[str]
) -> dict[str, Placed]:
    """Final norm and logits where they are given for the last few positions, more than one."""
    cut = {name: found for name, found in matches.items() if set(found.tensors) <= {*_CUT} - placed}
    counts = {n for name in cut for n in arrays[name].shape if 1 < n < sizes["T"]}
    found: dict[str, Placed] = {}
    for n in sorted(counts):
        found = place(arrays, cut, sizes | {"T": n})[0] | found
    return found


def _unstacked(arrays: Mapping[str, StoredArray], config: Config) -> dict[str, StoredArray]:
    """Arrays, with the stream or probabilities of all layers in one array split into one per layer."""
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
    """A note for each kind of tensor: its name in the file, and what was done to its axes."""
    lines = []
    for name, placed in chosen.items():
        layout, open_choice = layouts[name]
        axes = axes_of(name)
        text = f"{placed.source} is {name}" if placed.source != name else name
        steps = ["a part of it"] if placed.part else []
        if done := changes(layout, axes):
            steps.append(done)
        if placed.sizes["S"] > placed.sizes["T"] and "S" in axes and placed.sizes["T"] > 1:
            steps.append("keys beyond the tokens cut off")
        if "V" in axes and placed.sizes["V"] > vocabulary:
            steps.append(f"columns beyond the vocabulary of {vocabulary} cut off")
        if open_choice:
            steps.append("sizes coincide, so other axes are possible")
        if placed.rank == 4:
            steps.append("taken as already scaled by sqrt(D); map another tensor to 'embed' if the engine scales later")
        if steps or placed.source != name or all_of_them:
            lines.append("; ".join([text, *steps]))
    return grouped(lines)


def _why_none(misfits: list[str], nameless: list[str]) -> str:
    if misfits:
        return misfits[0]
    return f"it has {listed(nameless)}; a mapping file says which is which" if nameless else "it has none"


def _fed(
    path: Path, arrays: Mapping[str, StoredArray], config: Config, tokens: Array | None, positions: Array | None
) -> tuple[Array, Array, list[str]]:
    """Tokens and positions of a foreign trace, (B, T), and notes on what was assumed."""
    notes: list[str] = []
    name, own = _find(path, arrays, _TOKENS)
    if own is None and tokens is None:
        raise InputError(f"{path} holds no token ids ({', '.join(_TOKENS[:3])}): give the tokens that were run")
    if own is not None:
        own = np.atleast_2d(own)
        if own.ndim != 2 or not own.size:
            raise InputError(f"{path}: {name!r} has shape {own.shape}: expected token ids, (T,) or (B, T)")
        if tokens is not None and not np.array_equal(own, tokens):
            raise InputError(f"{path} has other tokens: {first_difference(own, np.atleast_2d(tokens))}")
        tokens = own
    assert tokens is not None
    tokens = np.atleast_2d(np.asarray(tokens, dtype=np.int64))
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise InputError(f"{path}: token id {wrong} is outside the vocabulary of {config.vocab_size} (ids from 0)")

    name, given = _find(path, arrays, _POSITIONS)
    mask_name, mask = _find(path, arrays, _MASKS)
    real = None if mask is None or mask.ndim > 2 else _like(tokens, mask, mask_name, path) != 0
    if given is not None:
        own_positions = _like(tokens, given, name, path)
        own_positions = own_positions if real is None else np.where(real, own_positions, -1)
    elif positions is not None:
        own_positions = _like(tokens, np.asarray(positions), "positions", path)
    elif real is not None:
        own_positions = np.where(real, np.cumsum(real, axis=1) - 1, -1)
        if not real.all():
            notes.append("positions are not given: counted from the first unmasked token of each row")
    else:
        own_positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if own_positions.max() < 0:
        raise InputError(f"{path}: every position is padding (-1, or masked): there is nothing to compare")
    if own_positions.min() < -1:
        raise InputError(f"{path}: invalid position {int(own_positions.min())}: expected 0 or more, or -1 for padding")
    return tokens, np.array(own_positions, dtype=np.int64), notes


def _is_tokens(name: str) -> bool:
    """Whether an array holds tokens, positions or a mask, not an activation."""
    return _word(name) in (*_TOKENS, *_POSITIONS, *_MASKS)


def _word(name: str) -> str:
    return re.split(r"[./]", name)[-1]


def _find(path: Path, arrays: Mapping[str, StoredArray], words: tuple[str, ...]) -> tuple[str, Array | None]:
    """First array of whole numbers, in any format, under one of these names."""
    for word in words:
        for name, array in arrays.items():
            if _word(name) != word:
                continue
            if array.dtype == "bool" and words is _TOKENS:
                raise InputError(f"{path}: {name!r} holds true and false, as masks do: expected token ids")
            if array.dtype.startswith(("int", "uint", "bool")):
                return name, array.read().astype(np.int64)
            if array.dtype not in ("float32", "float64") and words is _TOKENS:
                raise InputError(f"{path}: {name!r} is {array.dtype}, which rounds token ids: save them as integers")
            value = array.read()
            whole = value.dtype.kind == "f" and bool(np.all(np.abs(value) < 2**53)) and bool(np.all(value % 1 == 0))
            if not whole and words is _TOKENS:
                raise InputError(f"{path}: {name!r} holds numbers that are not whole: expected token ids")
            if whole:
                return name, value.astype(np.int64)
    return "", None


def _like(tokens: Array, given: Array, name: str, path: Path) -> Array:
    """Shaped like the tokens; a single row is used for all."""
    try:
        return np.broadcast_to(given, tokens.shape)
    except ValueError:
        raise InputError(f"{path}: {name!r} has shape {given.shape}: expected that of tokens, {tokens.shape}") from None
