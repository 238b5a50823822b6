"""Where a model name is looked up: on this machine only, never on the network.

A name is a folder, a shipped model ("tiny-it"), or a hub id ("google/gemma-2b-it") that was downloaded before.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from refgemma.errors import InputError, InputTypeError

_PACKAGE = Path(__file__).resolve().parents[1]


def find_model(name: str | Path, *, search: Sequence[str | Path] | None = None) -> Path:
    """Look up a model by name.

    The hub cache is where huggingface_hub keeps it: ``HF_HUB_CACHE``, else ``HF_HOME/hub``, else
    ``~/.cache/huggingface/hub``. Of a cached model the snapshot that ``refs/main`` names is taken.
    """
    if not isinstance(name, (str, Path)):
        raise InputTypeError(f"the model is {name!r:.60}: expected the name of a model or its folder")
    if not str(name):
        raise InputError(
            "the model name is empty: expected a folder, or a name such as 'tiny-it' or 'google/gemma-2b-it'"
        )
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"{name} begins with the home of a user who is not known here") from None
    if path.is_file():
        raise InputError(f"{path} is a file: give the folder that holds it, with config.json beside the weights")
    places = default_places() if search is None else [Path(place) for place in search]
    candidates = [path, *(folder for place in places for folder in _in_place(str(name), place))]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    for folder in candidates:
        if folder.is_dir():
            raise FileNotFoundError(f"{folder} holds no config.json: expected it in a model folder, beside the weights")
    raise FileNotFoundError(_sorry(str(name), places))


def default_places() -> list[Path]:
    """Folders of models that are searched when no others are given."""
    repository = [_PACKAGE.parent / "weights"] if (_PACKAGE.parent / "pyproject.toml").is_file() else []
    return [Path("weights"), *repository, _PACKAGE / "_weights", hub_cache()]


def hub_cache() -> Path:
    """Folder in which huggingface_hub keeps downloads; the rules are its own."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def _in_place(name: str, place: Path) -> Iterator[Path]:
    """Folders that may be the model, in one place."""
    short = name.removeprefix("google/")  # of no other owner: bob/gemma-2b-it is another model
    for folder in (f"google/{short}", short):
        yield place / folder
        cached = place / f"models--{folder.replace('/', '--')}"
        if (cached / "refs" / "main").is_file():
            yield cached / "snapshots" / (cached / "refs" / "main").read_text(encoding="utf-8").strip()


def _sorry(name: str, places: Iterable[Path]) -> str:
    """What was looked for, where, and what to do."""
    where = ", ".join(str(place) for place in places)
    there = sorted(
        {
            str(config.parent.relative_to(place))
            for place in places
            for pattern in ("*/config.json", "*/*/config.json")
            for config in place.glob(pattern)
        }
    )
    found = f" (found there: {', '.join(there)})" if there else ""
    return (
        f"no model {name!r}: no such folder, and nothing of that name in {where}{found}; give the folder that holds its"
        " config.json, or fetch one with `refgemma download OWNER/NAME`"
    )
