"""Logits of a model for the texts of published figures, some rows at a time, so that no text fills memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from refgemma.cache import KVCache
from refgemma.errors import InputError
from refgemma.gemma import Gemma
from refgemma.generation import CHUNK
from refgemma.model import Tap, forward, identity
from refgemma.numerics import Array, namespace_of, to_host
from refgemma.oracle.published.figures import read_json

_ROWS = 64  # positions whose logits are held at once: 131 MB in float64 at V = 256,000


def rows(gemma: Gemma, ids: list[int], first: int = 0, *, tap: Tap = identity) -> Iterator[Array]:
    """Logits from a position on, some rows at a time."""
    if not 0 < len(ids) <= gemma.config.max_positions:
        raise InputError(f"it takes {len(ids)} tokens, the model reads 1 to {gemma.config.max_positions}")
    xp = namespace_of(gemma.params["final_norm"])
    cache = KVCache(gemma.config, batch=1, capacity=len(ids), dtype=gemma.numerics.dtype, xp=xp)
    tokens, start = np.array([ids]), 0
    while start < len(ids):
        before = start < first
        stop = min(start + (CHUNK if before else _ROWS), first if before else len(ids))
        with np.errstate(invalid="ignore", over="ignore"):  # of damaged weights; what comes out is judged all the same
            scores = forward(
                gemma.params,
                gemma.config,
                tokens[:, start:stop],
                cache=cache,
                logits="last" if before else "all",
                numerics=gemma.numerics,
                tap=tap,
            )
        if not before:
            yield to_host(scores[0]).astype(np.float64)
        start = stop


def logprobs_of(gemma: Gemma, ids: list[int], first: int, *, final_cap: float | None = None) -> Array:
    """Natural log-probabilities of some tokens, each given all before it."""
    logprobs, at = [], first
    for part in rows(gemma, ids[:-1], first - 1):
        logits = part if final_cap is None else final_cap * np.tanh(part / final_cap)
        following = np.array(ids[at : at + len(logits)])
        logprobs.append(logits[np.arange(len(following)), following] - _log_sum(logits))
        at += len(following)
    return np.concatenate(logprobs)


def text_of(fields: Mapping[str, Any]) -> str:
    """Text that a figure is about."""
    if "text_ref" in fields:
        text: str = read_json("texts.json")["texts"][fields["text_ref"]]
        return text
    given = fields["text"]
    return given if isinstance(given, str) else given["repeat"] * given["times"] + given["then"]


def ids_of(gemma: Gemma, fields: Mapping[str, Any]) -> list[int]:
    """Token ids that a figure is about."""
    if "ids" in fields:
        ids: list[int] = fields["ids"]
        return ids
    if fields.get("chat"):
        return gemma.encode_prompt(text_of(fields))
    return gemma.tokenizer.encode(text_of(fields), bos=fields.get("bos", True), control="markers")  # markup tags count


def ids_up_to(gemma: Gemma, fields: Mapping[str, Any]) -> list[int]:
    """Token ids up to the position of a figure, the last one where it names none."""
    ids = ids_of(gemma, fields)
    position = fields.get("position", len(ids) - 1)
    if not 0 <= position < len(ids):
        raise InputError(f"position {position} is none of the {len(ids)} tokens: it may be tokenised differently")
    return ids[: position + 1]


def row_of(gemma: Gemma, fields: Mapping[str, Any]) -> Array:
    """Logits at the position of a figure, the last one where it names none."""
    ids = ids_up_to(gemma, fields)
    *_, last = rows(gemma, ids, len(ids) - 1)
    row: Array = last[-1]
    return row


def probs_of(gemma: Gemma, fields: Mapping[str, Any]) -> Array:
    """Probabilities at the position of a figure."""
    temperature = fields.get("temperature", 1.0)
    if not temperature > 0:
        raise InputError(f"temperature is {temperature!r}: expected a number above 0")
    scaled = row_of(gemma, fields) / temperature
    probs: Array = np.exp(scaled - _log_sum(scaled))
    return probs


def _log_sum(logits: Array) -> Array:
    """Log of the sum of exponentials along the last axis."""
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        top = logits.max(axis=-1)
        total: Array = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
    return total
