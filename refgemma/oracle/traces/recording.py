"""Record a trace: run the model, and keep every block of numbers that the tap sees at its place in the whole tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from refgemma.cache import KVCache
from refgemma.checkpoint.load import Progress
from refgemma.config import Config, to_json
from refgemma.errors import InputError, nearest_name
from refgemma.gemma import Gemma
from refgemma.generation import CHUNK
from refgemma.model import forward
from refgemma.numerics import Array, Bfloat16Matrix, namespace_of, to_host
from refgemma.ops.attention import allowed_keys
from refgemma.ops.linear import Adapted
from refgemma.oracle.operations import axes_of, names_of, shape_of
from refgemma.oracle.traces.trace import FORMAT, VERSION, Trace, read_trace_file, trace_file
from refgemma.params import Params, leaves
from refgemma.version import __version__

_DIGITS = 16  # of a fingerprint
# (name, where the block begins in the flat tensor, the block)
Sink: TypeAlias = Callable[[str, int, Array], None]


def trace(
    gemma: Gemma,
    tokens: ArrayLike,
    *,
    positions: ArrayLike | None = None,
    names: str | Sequence[str] = "*",
    last: bool = False,
    to: str | Path | None = None,
    model: str | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Run the model and record its named tensors.

    Parameters
    ----------
    gemma : Gemma
        The model, and the arithmetic to run it in.
    tokens : array_like of int, shape (T,) or (B, T)
        Token ids; ``<bos>`` is not added.
    positions : array_like of int, shape of `tokens`, optional
        Absolute positions, -1 for padding; counted from 0 by default.
    names : str or sequence of str
        Patterns of the tensors to keep, such as ``"layers.0.*"`` or ``["embed", "*.attn.probs"]``.
    last : bool
        Keep only the last real position of each row: axis T has length 1.
    to : str or Path, optional
        A safetensors file, written while the model runs, so that no more memory is needed than without a trace. By
        default, everything is kept in memory.
    model : str
        What `refgemma.load` takes to get this model, for the metadata, by which `refgemma.oracle.compare` loads it; by
        default what it was called with.
    progress : callable, optional
        ``progress(done, total)``, in layers.

    Returns
    -------
    Trace
        With `to`, its tensors are read from that file on access.

    Raises
    ------
    ValueError
        If tokens or positions have the wrong shape or range, or a pattern fits no tensor.
    OSError
        If the file cannot be written.

    Notes
    -----
    At most 512 positions are run at a time, through the cache. Scores and probabilities have shape (B, N, T, T); those
    of keys that a query does not see are meaningless, and stored as 0.
    """
    ids, places = checked(tokens, positions, gemma.config)
    shapes = {name: shape_of(name, gemma.config, *ids.shape, last=last) for name in chosen_names(names, gemma.config)}
    dtypes = dict.fromkeys(shapes, gemma.numerics.dtype.name)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "model": gemma.name if model is None else model,
        "adapters": json.dumps([f"{on.adapter.name}:{on.scale:g}" for on in gemma.all_adapters()]),
        "weights": fingerprint(gemma.params),
        "numerics": gemma.numerics.name,
        "refgemma": __version__,
        "numpy": np.__version__,
    } | ({"last": "true"} if last else {})
    if to is not None:
        with trace_file(to, shapes, dtypes, ids, places, meta | {"config": json.dumps(to_json(gemma.config))}) as write:
            record(gemma, ids, places, shapes, write, last=last, progress=progress)
        return read_trace_file(to)
    tensors = {name: np.zeros(shape, gemma.numerics.dtype) for name, shape in shapes.items()}

    def keep(name: str, start: int, block: Array) -> None:
        tensors[name].reshape(-1)[start : start + block.size] = block.reshape(-1)

    record(gemma, ids, places, shapes, keep, last=last, progress=progress)
    return Trace(tensors, dtypes, ids, places, gemma.config, meta)


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
    """Run the model, at most 512 positions at a time, and pass each block of the chosen tensors to a sink."""
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
    """Tokens and positions as int64 arrays (B, T); `forward` checks their range."""
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
    """Names that match a pattern, in the order of the computation."""
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    known = names_of(config)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in known):
            near = nearest_name(pattern, known)
            more = f"the nearest name is {near!r}" if near else "names are such as 'layers.3.attn.q' or 'layers.*.out'"
            raise InputError(f"{pattern!r} matches no tensor: {more}")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in wanted)]


def fingerprint(params: Params) -> str:
    """A few digits that tell one set of weights from another; empty with adapters attached.

    Read from all norms and the first row of every matrix: any training step changes those, and reading them takes no
    time.
    """
    digest = hashlib.sha256()
    for _, weight in sorted(leaves(params), key=_order):
        if isinstance(weight, Bfloat16Matrix):
            first = weight.rows(slice(0, 1), np.dtype(np.float32))
        elif isinstance(weight, Adapted):
            return ""
        else:
            first = weight[:1] if weight.ndim == 2 else weight
        digest.update(f"{weight.shape} ".encode() + to_host(first).astype("<f4").tobytes())
    return digest.hexdigest()[:_DIGITS]


def _order(leaf: tuple[str, Any]) -> tuple[int, int, str]:
    """The embedding, the layers one by one with their weights by name, the final norm, the head."""
    first, _, rest = leaf[0].partition(".")
    number, _, name = rest.partition(".")
    return ("embed", "layers", "final_norm", "head").index(first), int(number or 0), name
