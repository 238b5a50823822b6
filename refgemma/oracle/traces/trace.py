"""A trace: every named tensor of one run, in memory or in a safetensors file.

The file's metadata holds "format", "version", "config" (JSON), and what else is known of the run. Shapes follow from
the model and the tokens, so every tensor has its place in the file before the first number is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np

from refgemma.config import Config, from_json, to_json
from refgemma.errors import InputError, nearest_name
from refgemma.files.arrays import LazyArrays, read_arrays
from refgemma.files.atomic import whole_file
from refgemma.files.safetensors import SafetensorsWriter, read_metadata
from refgemma.numerics import Array, to_bfloat16
from refgemma.oracle.operations import axes_of, names_of, shape_of

FORMAT = "refgemma-trace"
VERSION = "1"
_END = "last."  # before the names of `Trace.ends` in a file


@dataclass(frozen=True, eq=False)
class Trace:
    """Named tensors of one run, of refgemma or of another engine.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        Names and axes as in `refgemma.oracle.operations`, batch axis first. Numbers are float16, float32 or float64;
        bfloat16 is widened to float32. Those of a file are read on access.
    dtypes : mapping of str to str
        How each was stored: "float32", "bfloat16", ...
    tokens : ndarray of int64, shape (B, T)
        Token ids.
    positions : ndarray of int64, shape (B, T)
        Absolute positions, -1 for padding.
    config : Config or None
        The model, if known.
    meta : mapping of str to str
        What else is known of the run: "model", "numerics", versions; "last" is "true" where only the last real position
        of each row was kept, and axis T of the tensors has length 1.
    notes : tuple of str
        What reading another engine's file assumed, and what it could not place.
    ends : frozenset of str
        Tensors of the last real position of each row only, or of the last n, while others have all positions: engines
        that generate compute no other logits. Their axis T has length 1, or n.
    """

    tensors: Mapping[str, Array]
    dtypes: Mapping[str, str]
    tokens: Array
    positions: Array
    config: Config | None = None
    meta: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()
    ends: frozenset[str] = frozenset()

    @property
    def last(self) -> bool:
        """Whether only the last real position of each row was kept."""
        return self.meta.get("last") == "true"

    def is_cut(self, name: str) -> bool:
        """Whether a tensor has the last positions only.

        Parameters
        ----------
        name : str
            One of the tensors.

        Returns
        -------
        bool
            True if all tensors have, or this one.
        """
        return self.last or name in self.ends

    def __repr__(self) -> str:
        B, T = self.tokens.shape
        stored = " and ".join(sorted(set(self.dtypes.values()))) or "nothing"
        return f"Trace: {len(self.tensors)} tensors of {B} x {T} tokens, {stored}" + ", last position" * self.last

    def save(self, path: str | Path) -> None:
        """Write it as safetensors: tensors, tokens and positions; everything else goes into the metadata.

        Parameters
        ----------
        path : str or Path
            An existing file is replaced, once everything is written.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        meta = {"format": FORMAT, "version": VERSION, "notes": json.dumps(self.notes)} | dict(self.meta)
        if self.config is not None:
            meta["config"] = json.dumps(to_json(self.config))
        stored = {_END + name if name in self.ends else name: name for name in self.tensors}
        shapes = {name: self.tensors[own].shape for name, own in stored.items()}
        dtypes = {name: self.dtypes[own] for name, own in stored.items()}
        with trace_file(path, shapes, dtypes, self.tokens, self.positions, meta) as write:
            for name, own in stored.items():
                write(name, 0, self.tensors[own])


def of_chunk(trace: Trace, name: str, chunk: slice) -> tuple[Array, Array]:
    """A tensor at some positions, widened, and at which of them it was given, (B, positions)."""
    axis = axes_of(name).index("T")
    whole = trace.tensors[name]
    columns = np.arange(chunk.start, chunk.stop)
    if not trace.is_cut(name):
        part = whole[(slice(None),) * axis + (chunk,)]
        return np.asarray(part, np.float64), np.ones((len(whole), len(columns)), bool)
    kept, T = whole.shape[axis], trace.positions.shape[1]
    ends = T - 1 - (trace.positions[:, ::-1] >= 0).argmax(axis=1)
    index = columns - (ends[:, None] - kept + 1)
    shape = [len(ends) if i == 0 else len(columns) if i == axis else 1 for i in range(whole.ndim)]
    spread = np.clip(index, 0, kept - 1).reshape(shape)
    return np.take_along_axis(np.asarray(whole, np.float64), spread, axis), (index >= 0) & (index < kept)


@contextmanager
def trace_file(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    tokens: Array,
    positions: Array,
    meta: Mapping[str, str],
) -> Iterator[Callable[[str, int, Array], None]]:
    """Give ``write(name, start, block)``, which puts numbers into a tensor from its number `start` on."""
    inputs = {"tokens": tokens, "positions": positions}  # (B, T)
    tensors = {name: ("int64", array.shape) for name, array in inputs.items()}
    tensors |= {name: (dtypes[name], shape) for name, shape in shapes.items()}
    with whole_file(path) as file:
        writer = SafetensorsWriter(file, tensors, meta)

        def write(name: str, start: int, block: Array) -> None:
            dtype = tensors[name][0]
            narrow = to_bfloat16(np.asarray(block)) if dtype == "bfloat16" else block.astype(dtype, copy=False)
            writer.write(name, start, narrow)

        for name, array in inputs.items():
            write(name, 0, array)
        yield write


def is_trace(path: str | Path) -> bool:
    """Whether a file says that refgemma wrote it as a trace."""
    try:
        return read_metadata(path).get("format") == FORMAT
    except (OSError, InputError):
        return False


def read_trace_file(path: str | Path, config: Config | None = None) -> Trace:
    """Read what `Trace.save` or `trace(..., to=)` wrote, checked against what it says of itself."""
    path, arrays, meta = Path(path), read_arrays(path), read_metadata(path)
    if meta.get("version") != VERSION:
        raise InputError(f"{path} has version {meta.get('version')!r} of its format: this refgemma reads {VERSION!r}")
    try:
        stored = from_json(json.loads(meta.pop("config")))
        notes = tuple(map(str, json.loads(meta.pop("notes", "[]"))))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is a trace without a valid config in its metadata ({error}): make it again") from None
    if config is not None and config != stored:
        raise InputError(f"{path} is a trace of another model than the one given: {_difference(stored, config)}")
    tokens, positions = (arrays.pop(name, None) for name in ("tokens", "positions"))
    sound = (array is not None and array.dtype == "int64" and len(array.shape) == 2 for array in (tokens, positions))
    if not all(sound) or tokens is None or positions is None or tokens.shape != positions.shape or 0 in tokens.shape:
        raise InputError(f"{path} lacks tokens and positions of one shape (B, T): make it again")
    last = meta.get("last") == "true"
    known = set(names_of(stored))
    for name, array in arrays.items():
        full = name.removeprefix(_END)
        end = full != name
        kept = (
            array.shape[1] if end and len(array.shape) == 3 else 1
        )  # what may have the last positions only is BTD or BTV
        want = shape_of(full, stored, *tokens.shape, last=last or end, kept=kept) if full in known else None
        if array.shape != want or array.dtype not in ("float16", "bfloat16", "float32", "float64"):
            near = nearest_name(name, known)
            wanted = f"the nearest name is {near}" if near else "this model has no tensor of that name"
            wanted = f"expected numbers of shape {want}" if want else wanted
            raise InputError(f"{path} holds {name!r}, {array.dtype} of shape {array.shape}: {wanted}")
    ends = frozenset(name for name in names_of(stored) if _END + name in arrays)
    found = {name.removeprefix(_END): array for name, array in arrays.items()}
    in_order = {name: found[name] for name in names_of(stored) if name in found}
    return Trace(
        LazyArrays({name: array.read for name, array in in_order.items()}),
        {name: array.dtype for name, array in in_order.items()},
        tokens.read(),
        positions.read(),
        stored,
        meta,
        notes,
        ends,
    )


def _difference(one: Config, other: Config) -> str:
    """First field in which two models differ."""
    fields, others = to_json(one), to_json(other)
    name = next(name for name in fields if fields[name] != others.get(name))
    return f"{name} is {fields[name]!r} there, {others.get(name)!r} here"


def first_difference(given: Array, expected: Array) -> str:
    """Where two batches of tokens differ."""
    if given.shape != expected.shape:
        return f"their shape is {given.shape}, expected {expected.shape}"
    b, t = (int(i) for i in np.argwhere(given != expected)[0])
    return f"row {b} has {int(given[b, t])} at {t}, expected {int(expected[b, t])}"
