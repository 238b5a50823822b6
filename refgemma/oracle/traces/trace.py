"""A trace: every named tensor of one run, recorded through the tap, in memory or in a file while the model runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

import refgemma
from refgemma.checkpoint.load import Progress
from refgemma.config import Config
from refgemma.errors import InputError, nearest_name
from refgemma.files.arrays import LazyArrays, StoredArray, read_arrays
from refgemma.files.safetensors import read_metadata
from refgemma.gemma import Gemma
from refgemma.numerics import Array
from refgemma.oracle.operations import axes_of, names_of, shape_of
from refgemma.oracle.traces.file import FORMAT, VERSION, is_trace, trace_file
from refgemma.oracle.traces.fingerprint import fingerprint
from refgemma.oracle.traces.recording import checked, chosen_names, record

_END = "last."  # before the names of `Trace.ends` in a file


@dataclass(frozen=True, eq=False)
class Trace:
    """Named tensors of one run, ours or another engine's.

    Attributes
    ----------
    tensors : mapping of str to ndarray
        Under our names and in our axes, see `refgemma.oracle.operations`; batch axis first. Numbers are float16,
        float32 or float64; bfloat16 is widened to float32. Those of a file are read when they are asked for.
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
        What reading a file of another engine took for granted, or could not place.
    ends : frozenset of str
        Those of the tensors that were given at the last real position of each row only, or at the last n, beside
        others of all: engines that generate compute no other logits. Axis T has length 1, or n.
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
        """Whether a tensor is of the last positions only.

        Parameters
        ----------
        name : str
            One of the tensors.

        Returns
        -------
        bool
            As all are, or it alone.
        """
        return self.last or name in self.ends

    def __repr__(self) -> str:
        B, T = self.tokens.shape
        stored = " and ".join(sorted(set(self.dtypes.values()))) or "nothing"
        return f"Trace: {len(self.tensors)} tensors of {B} x {T} tokens, {stored}" + ", last position" * self.last

    def save(self, path: str | Path) -> None:
        """Write it as safetensors: the tensors, tokens and positions; everything else in the metadata.

        Parameters
        ----------
        path : str or Path
            Where to; a file that is there is replaced, at the very end.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        meta = {"format": FORMAT, "version": VERSION, "notes": json.dumps(self.notes)} | dict(self.meta)
        if self.config is not None:
            meta["config"] = json.dumps(asdict(self.config))
        stored = {_END + name if name in self.ends else name: name for name in self.tensors}
        shapes = {name: self.tensors[ours].shape for name, ours in stored.items()}
        dtypes = {name: self.dtypes[ours] for name, ours in stored.items()}
        with trace_file(path, shapes, dtypes, self.tokens, self.positions, meta) as write:
            for name, ours in stored.items():
                write(name, 0, self.tensors[ours])


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
        A safetensors file that is written while the model runs, so that memory holds no more than a run without a
        trace needs. Without it, all is in memory.
    model : str
        What `refgemma.load` is called with to get this model, for the metadata, by which `refgemma.oracle.compare`
        knows which it is; by default what it was called with.
    progress : callable, optional
        ``progress(done, total)``, in layers.

    Returns
    -------
    Trace
        Of that file, if one was asked for.

    Raises
    ------
    ValueError
        If tokens or positions have the wrong shape or range, or a pattern fits no tensor.
    OSError
        If the file cannot be written.

    Notes
    -----
    At most 512 positions are run at a time, through the cache. Scores and probabilities have shape (B, N, T, T); those
    of pairs that may not attend mean nothing, and are stored as 0.
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
        "refgemma": refgemma.__version__,
        "numpy": np.__version__,
    } | ({"last": "true"} if last else {})
    if to is not None:
        with trace_file(to, shapes, dtypes, ids, places, meta | {"config": json.dumps(asdict(gemma.config))}) as write:
            record(gemma, ids, places, shapes, write, last=last, progress=progress)
        return read_trace(to)
    tensors = {name: np.zeros(shape, gemma.numerics.dtype) for name, shape in shapes.items()}

    def keep(name: str, start: int, block: Array) -> None:
        tensors[name].reshape(-1)[start : start + block.size] = block.reshape(-1)

    record(gemma, ids, places, shapes, keep, last=last, progress=progress)
    return Trace(tensors, dtypes, ids, places, gemma.config, meta)


def read_trace(path: str | Path, *, config: Config | None = None, mapping: Mapping[str, str] | None = None) -> Trace:
    """Read a trace.

    Parameters
    ----------
    path : str or Path
        What `Trace.save` wrote, or another engine's file, see `refgemma.oracle.foreign.reader.read_foreign`.
    config : Config, optional
        The model; needed for another engine's file.
    mapping : mapping of str to str, optional
        Names of the file to ours.

    Returns
    -------
    Trace
        Its tensors are read when they are asked for.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, or its tensors do not fit the model.
    """
    arrays = read_arrays(path)
    if is_trace(path):
        return _ours(Path(path), arrays, read_metadata(path), config)
    if config is None:
        raise InputError(f"{path} is no trace of refgemma: say which model its tensors belong to")
    from refgemma.oracle.foreign.reader import read_foreign  # it makes Traces, so it needs this module first

    return read_foreign(path, config, mapping=mapping)


def _ours(path: Path, arrays: dict[str, StoredArray], meta: dict[str, str], config: Config | None) -> Trace:
    """Check that a file says of itself what it holds."""
    if meta.get("version") != VERSION:
        raise InputError(f"{path} has version {meta.get('version')!r} of its format: this refgemma reads {VERSION!r}")
    try:
        stored = Config(**json.loads(meta.pop("config")))
        notes = tuple(map(str, json.loads(meta.pop("notes", "[]"))))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is a trace without a sound config in its metadata ({error}): make it again") from None
    if config is not None and config != stored:
        raise InputError(f"{path} is a trace of another model than the one given: {_difference(stored, config)}")
    tokens, positions = (arrays.pop(name, None) for name in ("tokens", "positions"))
    sound = (array is not None and array.dtype == "int64" and len(array.shape) == 2 for array in (tokens, positions))
    if not all(sound) or tokens is None or positions is None or tokens.shape != positions.shape or 0 in tokens.shape:
        raise InputError(f"{path} lacks tokens and positions of one shape (B, T): make it again")
    last = meta.get("last") == "true"
    known = set(names_of(stored))
    for name, array in arrays.items():
        ours = name.removeprefix(_END)
        end = ours != name
        kept = array.shape[1] if end and len(array.shape) == 3 else 1  # what may be of the last positions is BTD or BTV
        want = shape_of(ours, stored, *tokens.shape, last=last or end, kept=kept) if ours in known else None
        if array.shape != want or array.dtype not in ("float16", "bfloat16", "float32", "float64"):
            near = nearest_name(name, known)
            wanted = f"the nearest name is {near}" if near else "no tensor of this model is called so"
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
    fields, others = asdict(one), asdict(other)
    name = next(name for name in fields if fields[name] != others[name])
    return f"{name} is {fields[name]!r} there, {others[name]!r} here"
