"""Where in a model a known bug may be: everywhere it can, in some layers, in the final norm; and that in words.

Each operation of a trace is judged on its own inputs. So a bug in one layer is seen there, in the first tensors that
were given, and nowhere else: locations that are seen in different tensors are judged one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from refgemma.config import Config
from refgemma.oracle.bugs.catalogue import Bug
from refgemma.oracle.operations import IN_LAYER, names_of, sources, split_name

# One operation that a layer has twice: each may be wrong by itself. Other bugs move several tensors as one.
_TWICE = {"attn.norm", "mlp.norm", "final_norm", "attn.q_rope", "attn.k_rope"}
_RUN = 3  # layers in a row, from which on they are written as "4 to 6"


@dataclass(frozen=True)
class Location:
    """A part of the model in which a bug may be, independently of the rest."""

    names: tuple[str, ...]  # tensors that the bug moves there
    seen: frozenset[str]  # given tensors that differ if the bug is there


def locations_of(bug: Bug, config: Config, given: Iterable[str]) -> list[Location]:
    """Locations of a bug that a trace can tell apart."""
    exact = frozenset(given)
    units: dict[str | int, list[str]] = {}
    for name in names_of(config):
        layer, kind = split_name(name)
        if kind in bug.where:
            units.setdefault(name if layer is None or _TWICE.issuperset(bug.where) else layer, []).append(name)
    locations: list[Location] = []
    for names in units.values():
        location = Location(tuple(names), _seen(names, config, exact))
        shared = [other for other in locations if other.seen & location.seen]
        locations = [other for other in locations if other not in shared]
        both = [name for one in (*shared, location) for name in one.names]
        locations.append(Location(tuple(both), location.seen.union(*(one.seen for one in shared))))
    return [location for location in locations if location.seen]


def words(names: Iterable[str], where: Iterable[str]) -> str:
    """Say where a bug is, such as "in layers 3, 7 only"."""
    layers: dict[str, list[int]] = {kind: [] for kind in where if kind in IN_LAYER}
    outside = []
    for name in names:
        layer, kind = split_name(name)
        if layer is None:
            outside.append("the final norm" if name == "final_norm" else name)
        else:
            layers[kind].append(layer)
    of_all = list(layers.values())
    if all(one == of_all[0] for one in of_all):
        said = [_layers(of_all[0])] if of_all and of_all[0] else []
    else:
        said = [f"{kind} of {_layers(some)}" for kind, some in layers.items() if some]
    return f"in {' and '.join([*said, *outside])} only"


def _seen(names: Iterable[str], config: Config, given: frozenset[str]) -> frozenset[str]:
    """Tensors that were given, and are reached from these before any other that was given."""
    moved = set(names)
    for name in names_of(config):
        if any(source in moved and source not in given for source in sources(name, config, of_bugs=True)):
            moved.add(name)
    return frozenset(moved & given)


def _layers(numbers: list[int]) -> str:
    """Numbers of layers in words, such as "layers 0 to 3, 7"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    said = [f"{run[0]} to {run[-1]}" if len(run) >= _RUN else ", ".join(map(str, run)) for run in runs]
    return ("layer " if len(numbers) == 1 else "layers ") + ", ".join(said)
