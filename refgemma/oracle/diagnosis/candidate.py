"""Another engine's trace as explanations are put to it: where it counts, and piece by piece."""

from __future__ import annotations

import numpy as np

from refgemma.numerics import Array
from refgemma.ops.attention import allowed_keys
from refgemma.oracle.operations import axes_of
from refgemma.oracle.traces.trace import Trace, of_chunk


def fits(tokens: Array, theirs: Trace) -> bool:
    """Whether their tensors have as many positions as were fed. tokens (B, T)."""
    told = {name: "S" if theirs.is_cut(name) else "T" for name in theirs.tensors}
    lengths = {
        theirs.tensors[name].shape[axes_of(name).index(axis)] for name, axis in told.items() if axis in axes_of(name)
    }
    return lengths <= {tokens.shape[1]}


def theirs_at(theirs: Trace, name: str, ours: Array, chunk: slice) -> Array:
    """Their tensor of some positions."""
    if name not in theirs.tensors:
        return ours
    wide, given = of_chunk(theirs, name, chunk)
    if axes_of(name) == "BNTS":
        wide = wide[..., : chunk.stop]
    here = _counted(name, np.where(given, theirs.positions[:, chunk], -1), theirs.positions[:, : chunk.stop])
    return np.where(here & np.isfinite(wide), wide, ours)


def overflows(theirs: Trace, name: str, limit: float) -> bool:
    """Whether a tensor holds NaN, or a number beyond a limit, where it counts."""
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
