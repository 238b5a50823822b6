"""Run the model and hand every block of numbers that the tap sees, with its place in the whole tensor, to a sink."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from refgemma.cache import KVCache
from refgemma.checkpoint.load import Progress
from refgemma.config import Config
from refgemma.errors import InputError, nearest_name
from refgemma.gemma import Gemma
from refgemma.generation import CHUNK
from refgemma.model import forward
from refgemma.numerics import Array, namespace_of, to_host
from refgemma.ops.attention import allowed_keys
from refgemma.oracle.operations import axes_of, names_of

# (name, where the block begins in the flat tensor, the block)
Sink: TypeAlias = Callable[[str, int, Array], None]


def record(
    gemma: Gemma,
    tokens: Array,
    positions: Array,
    shapes: Mapping[str, tuple[int, ...]],
    sink: Sink,
    *,
    last: bool = False,
    progress: Progress | None = None,
) -> None:
    """Feed tokens to the model, at most 512 positions at a time, and give what it computes to a sink.

    tokens, positions (B, T).
    """
    B, T = tokens.shape
    xp = namespace_of(gemma.params["final_norm"])
    cache = KVCache(gemma.config, batch=B, capacity=T, dtype=gemma.numerics.dtype, xp=xp)
    final = T - 1 - (positions[:, ::-1] >= 0).argmax(axis=1)  # last real position of each row
    every_logit = not last and ("logits" in shapes or "final_norm" in shapes)
    done, total = 0, gemma.config.num_layers * -(-T // CHUNK)

    for start in range(0, T, CHUNK):
        stop = min(start + CHUNK, T)
        allowed = allowed_keys(positions[:, start:stop], positions[:, :stop])[:, None]  # B1TS

        def tap(name: str, value: Array, start: int = start, stop: int = stop, allowed: Array = allowed) -> Array:
            nonlocal done
            if name in shapes:
                seen = to_host(value)
                by_position = _positions_first(name, np.where(allowed, seen, 0) if axes_of(name) == "BNTS" else seen)
                for b, row in enumerate(by_position):
                    if not last:
                        _put(sink, name, shapes[name], b, start, row)
                    elif start <= final[b] < stop:
                        # After the last layer `forward` has kept this one position already.
                        t = final[b] - start if len(row) == stop - start else 0
                        _put(sink, name, shapes[name], b, 0, row[t : t + 1])
            if name.startswith("layers.") and name.endswith("mlp.down"):
                done += 1
                if progress is not None:
                    progress(done, total)
            return value

        forward(
            gemma.params,
            gemma.config,
            tokens[:, start:stop],
            positions=positions[:, start:stop],
            cache=cache,
            logits="all" if every_logit else "last",
            numerics=gemma.numerics,
            tap=tap,
        )


def _positions_first(name: str, value: Array) -> Array:
    """View whose first axes are B and T."""
    return value.swapaxes(1, 2) if axes_of(name) == "BNTS" else value


def _put(sink: Sink, name: str, shape: tuple[int, ...], b: int, t: int, row: Array) -> None:
    """Rows of one batch entry from position `t` on, axis T first, in as few blocks as lie together in the tensor."""
    if axes_of(name) != "BNTS":
        sink(name, int(np.ravel_multi_index((b, t, *[0] * (len(shape) - 2)), shape)), row)
        return
    for n in range(shape[1]):
        keys = np.zeros((len(row), shape[3]), row.dtype)
        keys[:, : row.shape[2]] = row[:, n]
        sink(name, int(np.ravel_multi_index((b, n, t, 0), shape)), keys)


def checked(tokens: ArrayLike, positions: ArrayLike | None, config: Config) -> tuple[Array, Array]:
    """Tokens and positions as a run wants them; their range is what `forward` looks at.

    Returns tokens, positions (B, T).
    """
    try:
        ids = np.asarray(tokens)
        places = None if positions is None else np.asarray(positions)
    except ValueError:
        raise InputError("tokens or positions have rows of different lengths: expected shape (T,) or (B, T)") from None
    if ids.ndim not in (1, 2) or not ids.size:
        raise InputError(f"tokens have shape {ids.shape}: expected (T,) or (B, T), at least one of each")
    if ids.dtype.kind not in "iu":
        raise InputError(f"tokens have dtype {ids.dtype}: expected whole numbers, the token ids")
    if places is None:
        places = np.broadcast_to(np.arange(ids.shape[-1]), ids.shape)
    if places.shape != ids.shape or places.dtype.kind not in "iu":
        raise InputError(f"positions are {places.dtype} of shape {places.shape}: expected whole numbers, {ids.shape}")
    if ids.shape[-1] > config.max_positions:
        raise InputError(f"{ids.shape[-1]} tokens were given, the model reads at most {config.max_positions}")
    return np.atleast_2d(ids).astype(np.int64), np.atleast_2d(places).astype(np.int64)


def chosen_names(patterns: str | Sequence[str], config: Config) -> list[str]:
    """Names that fit a pattern, in the order of the computation."""
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    known = names_of(config)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in known):
            near = nearest_name(pattern, known)
            more = f"the nearest name is {near!r}" if near else "names are such as 'layers.3.attn.q' or 'layers.*.out'"
            raise InputError(f"{pattern!r} fits no tensor: {more}")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in wanted)]
