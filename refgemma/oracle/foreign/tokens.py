"""The tokens and positions that another engine's file holds, under one of the names that are usual."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refgemma.config import Config
from refgemma.errors import InputError
from refgemma.files.arrays import StoredArray
from refgemma.numerics import Array

_TOKENS = ("tokens", "input_ids", "token_ids", "ids", "input_tokens")
_POSITIONS = ("positions", "position_ids", "segment_pos")
_MASKS = ("attention_mask", "padding_mask", "input_mask")


def foreign_tokens(
    path: Path, arrays: Mapping[str, StoredArray], config: Config, tokens: Array | None, positions: Array | None
) -> tuple[Array, Array, list[str]]:
    """Tokens and positions of a foreign trace. tokens, positions (B, T) -> tokens, positions (B, T)."""
    notes: list[str] = []
    name, own = _find(path, arrays, _TOKENS)
    if own is None and tokens is None:
        raise InputError(f"{path} holds no token ids ({', '.join(_TOKENS[:3])}): say which tokens were run")
    if own is not None:
        own = np.atleast_2d(own)
        if own.ndim != 2 or not own.size:
            raise InputError(f"{path}: {name!r} has shape {own.shape}: expected token ids, (T,) or (B, T)")
        if tokens is not None and not np.array_equal(own, tokens):
            raise InputError(f"{path} is about other tokens: {_first_difference(own, np.atleast_2d(tokens))}")
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
            notes.append("positions are not given: counted from the first token that is not masked, in each row")
    else:
        own_positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if own_positions.max() < 0:
        raise InputError(f"{path}: every position is padding (-1, or masked): nothing is left to compare")
    if own_positions.min() < -1:
        raise InputError(
            f"{path}: position {int(own_positions.min())} is invalid: expected 0 or more, or -1 for padding"
        )
    return tokens, np.array(own_positions, dtype=np.int64), notes


def is_tokens(name: str) -> bool:
    """Whether an array is about tokens, and no activation."""
    return _word(name) in (*_TOKENS, *_POSITIONS, *_MASKS)


def _word(name: str) -> str:
    return re.split(r"[./]", name)[-1]


def _find(path: Path, arrays: Mapping[str, StoredArray], words: tuple[str, ...]) -> tuple[str, Array | None]:
    """First array of whole numbers, of whatever format, that goes by one of these names."""
    for word in words:
        for name, array in arrays.items():
            if _word(name) != word:
                continue
            if array.dtype == "bool" and words is _TOKENS:
                raise InputError(f"{path}: {name!r} is true and false, as masks are: expected token ids")
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
    """One row for all where there is one row."""
    try:
        return np.broadcast_to(given, tokens.shape)
    except ValueError:
        raise InputError(f"{path}: {name!r} has shape {given.shape}: expected that of tokens, {tokens.shape}") from None


def _first_difference(own: Array, tokens: Array) -> str:
    if own.shape != tokens.shape:
        return f"they have shape {own.shape}, ours {tokens.shape}"
    b, t = (int(i) for i in np.argwhere(own != tokens)[0])
    return f"row {b} has {int(own[b, t])} at {t}, ours {int(tokens[b, t])}"
