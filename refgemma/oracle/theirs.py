"""Another engine's trace as explanations are put to it: where it counts, and piece by piece."""

from __future__ import annotations

import numpy as np

from refgemma.numerics import Array
from refgemma.ops.attention import allowed_keys
from refgemma.oracle.setups import Setup
from refgemma.oracle.tensor_names import axes_of
from refgemma.oracle.trace import Trace


def fits(setup: Setup, theirs: Trace) -> bool:
    """Whether their tensors have as many positions as a setup feeds.

    Parameters
    ----------
    setup : Setup
        What is fed.
    theirs : Trace
        What came out.

    Returns
    -------
    bool
        True also where only the last position was kept.
    """
    lengths = {value.shape[axes_of(name).index("T")] for name, value in theirs.tensors.items()}
    return theirs.last or lengths <= {setup.tokens.shape[1]}


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
    scores = axes_of(name) == "BNTS"
    here = _counted(theirs, name, chunk)
    whole = theirs.tensors[name]
    if theirs.last:
        given = whole[..., : chunk.stop] if scores else whole
    else:
        given = whole[:, :, chunk, : chunk.stop] if scores else whole[:, chunk]
    wide = np.asarray(given, np.float64)
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
    value = theirs.tensors[name]
    here: Array = _counted(theirs, name, slice(0, theirs.positions.shape[1]))
    if theirs.last:
        here = np.any(here, axis=axes_of(name).index("T"), keepdims=True)
    elif here.shape[axes_of(name).index("T")] != value.shape[axes_of(name).index("T")]:
        return False  # other tokens were fed: there is no telling what is padding
    return not np.abs(np.where(here, value, 0)).max() <= limit  # true of NaN, too


def _counted(theirs: Trace, name: str, chunk: slice) -> Array:
    """Where a tensor counts: no padding, and no key that a query does not see; of the right number of axes."""
    places = theirs.positions[:, chunk]
    if axes_of(name) == "BNTS":
        here = allowed_keys(places, theirs.positions[:, : chunk.stop])[:, None]
    else:
        here = (places >= 0).reshape(*places.shape, *[1] * (len(axes_of(name)) - 2))
    if theirs.last:
        last = (places >= 0) & (places == theirs.positions.max(axis=1, keepdims=True))  # BT
        here = here & (last[:, None, :, None] if axes_of(name) == "BNTS" else last.reshape(here.shape))
    return here
