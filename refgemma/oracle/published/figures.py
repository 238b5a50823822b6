"""Figures that others have published for models of the Gemma family, as data.

They are in ``data/*_figures.json``, one file per family, each with its public source, its tolerance and the reason for
that. The head of those files says what each kind of figure means; `refgemma.oracle.published.measures` computes it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refgemma.checkpoint.names import FAMILIES
from refgemma.errors import InputError

DATA = Path(__file__).parent / "data"
_FILES = "*_figures.json"
_NEEDED = ("id", "models", "kind", "source")
_NUMBERS = ("atol", "rtol", "less_than", "final_cap", "temperature")


@dataclass(frozen=True, eq=False)
class Figure:
    """One published figure."""

    id: str  # its name in the file
    family: str  # key of `refgemma.checkpoint.names.FAMILIES`
    models: tuple[str, ...]  # names of the models
    kind: str  # what was computed, such as "logit_mean" or "greedy_text"
    url: str  # where it is published
    note: str  # what its source leaves open; mostly empty
    trust: str  # "high" or "medium"
    computed_in: str  # format that the engine behind it computed in
    reason: str  # why its tolerance is what it is
    fields: Mapping[str, Any]  # everything else: the input, what is expected, the tolerance


def read_figures(path: str | Path) -> list[Figure]:
    """Read a file of figures."""
    path = Path(path)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: expected a JSON file of figures") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): expected figures as in {DATA}") from None
    try:
        sources, reasons = held["sources"], held["tolerances"]
        figures = [_figure(entry, held["family"], sources, reasons) for entry in held["figures"]]
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a file of figures ({error!r}): expected the form of those in {DATA}") from None
    return figures


def _figure(entry: dict[str, Any], family: str, sources: Mapping[str, Any], reasons: Mapping[str, str]) -> Figure:
    missing = [name for name in _NEEDED if name not in entry]
    if missing:
        raise InputError(f"a figure has no {', '.join(missing)}: {json.dumps(entry):.80}")
    wrong = [name for name in _NUMBERS if name in entry and not isinstance(entry[name], (int, float))]
    if wrong:
        raise InputError(f"figure {entry['id']} has {wrong[0]} {entry[wrong[0]]!r}: expected a number")
    named = {"id", "models", "kind", "source", "trust", "computed_in"}
    source = sources[entry["source"]]
    return Figure(
        id=entry["id"],
        family=family,
        models=tuple(entry["models"]),
        kind=entry["kind"],
        url=source["url"],
        note=source.get("note", ""),
        trust=entry.get("trust", "medium"),
        computed_in=entry.get("computed_in", "unknown"),
        reason=reasons.get(entry["kind"], ""),
        fields={name: value for name, value in entry.items() if name not in named},
    )


@functools.cache
def published() -> tuple[Figure, ...]:
    """All figures that come with this package."""
    return tuple(figure for path in sorted(DATA.glob(_FILES)) for figure in read_figures(path))


def figures_of(model: str, figures: Iterable[Figure] | None = None) -> list[Figure]:
    """Figures of one model."""
    return [figure for figure in (published() if figures is None else figures) if model in figure.models]


@functools.cache
def models() -> Mapping[str, Mapping[str, Any]]:
    """Every model that figures exist for."""
    known: dict[str, dict[str, Any]] = {name: dict(entry) for name, entry in read_json("models.json")["models"].items()}
    for figure in published():
        for name in figure.models:
            known.setdefault(name, {"family": figure.family})
    for path in DATA.glob(_FILES):
        for name, checksums in read_json(path.name).get("checksums", {}).items():
            known[name]["checksums"] = checksums
    return dict(sorted(known.items(), key=lambda item: item[1]["family"]))


@functools.cache
def parameter_counts() -> Mapping[str, tuple[int, str]]:
    """Published numbers of parameters, and where they are published."""
    counts: dict[str, tuple[int, str]] = {}
    for family in FAMILIES:
        held = read_json(f"{family}_figures.json")
        url = held["sources"][held["parameter_counts"]["source"]]["url"]
        counts |= {name: (n, url) for name, n in held["parameter_counts"].items() if name != "source"}
    return counts


def kinds_of(model: str) -> dict[str, int]:
    """How many figures of each kind a model has."""
    kinds: dict[str, int] = {}
    for figure in figures_of(model):
        kinds[figure.kind] = kinds.get(figure.kind, 0) + 1
    return kinds


@functools.cache
def read_json(name: str) -> Any:
    """Read a data file of the package."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))
