"""Write the changes of adapters into the weights of a model, in memory."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from refgemma.errors import InputError
from refgemma.lora.materialise import materialise
from refgemma.lora.rounding import format_of
from refgemma.model import Params
from refgemma.numerics import Bfloat16Matrix, to_host


def merge(params: Params, before: Params) -> Params:
    """Parameters with plain weights in place of adapted ones.

    Parameters
    ----------
    params : Params
        A model with adapters on it.
    before : Params
        The same model without them; its formats are kept.

    Returns
    -------
    Params
        Shares what no adapter changes. ``head`` is ``embed`` itself if it was before and both came out alike.

    Raises
    ------
    ValueError
        If a change cannot be written as a weight.
    """

    def merged(path: str, new: Any, old: Any) -> Any:
        if isinstance(new, dict):
            return {name: merged(f"{path}.{name}" if path else name, new[name], old[name]) for name in new}
        if isinstance(new, list):
            return [merged(f"{path}.{i}", *pair) for i, pair in enumerate(zip(new, old, strict=True))]
        if new is old:
            return new
        try:
            return materialise(new, format_of(old), table=path == "embed")
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None

    tree = merged("", params, before)
    tied, changed = before["head"] is before["embed"], tree["embed"] is not before["embed"]
    if tied and changed and tree["head"] is not before["head"] and _alike(tree["embed"], tree["head"]):
        tree["head"] = tree["embed"]
    return cast(Params, tree)


def _alike(a: Any, b: Any) -> bool:
    a, b = (to_host(w.bits if isinstance(w, Bfloat16Matrix) else w) for w in (a, b))
    return np.array_equal(a, b)
