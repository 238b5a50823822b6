"""Another engine's trace as explanations are put to it: where it counts, and piece by piece."""

from __future__ import annotations

import numpy as np

from refgemma.numerics import Array
from refgemma.ops.attention import allowed_keys
from refgemma.oracle.tensor_names import axes_of
from refgemma.oracle.trace import Trace


def fits(tokens: Array, theirs: Trace) -> bool:
    """Whether their tensors have as many positions as were fed.

    Parameters
    ----------
    tokens : ndarray of int, shape (B, T)
        What is fed.
    theirs : Trace
        What came out.

    Returns
    -------
    bool
        True also where only the last positions were kept, unless scores tell how many keys there were.
    """
    told = {name: "S" if theirs.is_cut(name) else "T" for name in theirs.tensors}
    lengths = {
        theirs.tensors[name].shape[axes_of(name).index(axis)] for name, axis in told.items() if axis in axes_of(name)
    }
    return lengths <= {tokens.shape[1]}


def of_chunk(theirs: Trace, name: str, chunk: slice) -> tuple[Array, Array]:
    """Their tensor of some positions, wide, and at which of them it was given.

    Parameters
    ----------
    theirs : Trace
        What they computed; what `Trace.is_cut` holds the last real position of each row, or the last n.
    name : str
        A tensor of it.
    chunk : slice
        Of the T positions, with a start and a stop.

    Returns
    -------
    value : ndarray of float64
        As many positions as the chunk; what was not given is some other number.
    given : ndarray of bool, shape (B, chunk)
        Where there is one of theirs.
    """
    axis = axes_of(name).index("T")
    whole = theirs.tensors[name]
    columns = np.arange(chunk.start, chunk.stop)
    if not theirs.is_cut(name):
        part = whole[(slice(None),) * axis + (chunk,)]
        return np.asarray(part, np.float64), np.ones((len(whole), len(columns)), bool)
    kept, T = whole.shape[axis], theirs.positions.shape[1]
    ends = T - 1 - (theirs.positions[:, ::-1] >= 0).argmax(axis=1)
    index = columns - (ends[:, None] - kept + 1)
    shape = [len(ends) if i == 0 else len(columns) if i == axis else 1 for i in range(whole.ndim)]
    spread = np.clip(index, 0, kept - 1).reshape(shape)
    return np.take_along_axis(np.asarray(whole, np.float64), spread, axis), (index >= 0) & (index < kept)


def theirs_at(theirs: Trace, name: str, ours: Array, chunk: slice) -> Array:
    """Their tensor of some positions.

    Parameters
    ----------
    theirs : Trace
        What they computed.
    name : str
        The tensor.
    ours : ndarray of float64
        What stands in where they gave nothing finite, at padding, and where a query does not see a key.
    chunk : slice
        Of the T positions.

    Returns
    -------
    ndarray of float64
        Shaped as `ours`.
    """
    if name not in theirs.tensors:
        return ours
    wide, given = of_chunk(theirs, name, chunk)
    if axes_of(name) == "BNTS":
        wide = wide[..., : chunk.stop]
    here = _counted(name, np.where(given, theirs.positions[:, chunk], -1), theirs.positions[:, : chunk.stop])
    return np.where(here & np.isfinite(wide), wide, ours)


def overflows(theirs: Trace, name: str, limit: float) -> bool:
    """Whether a tensor holds NaN, or a number beyond a limit, where it counts.

    Parameters
    ----------
    theirs : Trace
        What they computed.
    name : str
        A tensor of it.
    limit : float
        Largest magnitude.

    Returns
    -------
    bool
        Masks that engines add to scores, and whatever stands at padding, are no matter.
    """
    value, places = theirs.tensors[name], theirs.positions
    kept = value.shape[axes_of(name).index("T")]
    if theirs.is_cut(name):
        T = places.shape[1]
        at = T - 1 - (places[:, ::-1] >= 0).argmax(axis=1)[:, None] + np.arange(1 - kept, 1)
        places = np.where(at >= 0, np.take_along_axis(places, np.maximum(at, 0), axis=1), -1)
    elif kept != places.shape[1]:
        return False  # other tokens were fed: there is no telling what is padding
    here = _counted(name, places, theirs.positions)
    return not float(np.abs(np.where(here, value, 0)).max()) <= limit  # true of NaN, too


def _counted(name: str, places: Array, keys: Array) -> Array:
    """Where a tensor counts: no padding, and no key that a query does not see; of the right number of axes."""
    if axes_of(name) == "BNTS":
        return allowed_keys(places, keys)[:, None]
    return (places >= 0).reshape(*places.shape, *[1] * (len(axes_of(name)) - 2))
