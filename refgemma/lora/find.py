"""Where an adapter is looked up: a folder, or the name of one that lies in a ``lora`` folder beside the models."""

from __future__ import annotations

from pathlib import Path

from refgemma.checkpoint.folder import default_places
from refgemma.lora.adapter_config import CONFIG_FILE


def find_adapter(name: str | Path) -> Path:
    """Look up an adapter by name.

    Parameters
    ----------
    name : str or Path
        A folder that holds ``adapter_config.json``, or the name of a shipped adapter, such as "pirate".

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileNotFoundError
        If there is no such adapter; says which there are.
    """
    places = [place / "lora" for place in default_places()]
    candidates = [Path(name).expanduser(), *(place / name for place in places)]
    for folder in candidates if str(name) else []:
        if (folder / CONFIG_FILE).is_file():
            return folder
    there = sorted({config.parent.name for place in places for config in place.glob(f"*/{CONFIG_FILE}")})
    known = f"; there are {', '.join(there)}" if there else ""
    raise FileNotFoundError(f"no adapter {str(name)!r}: expected a folder that holds {CONFIG_FILE}{known}")


def split_scale(text: str | Path) -> tuple[str, float]:
    """Take ``NAME:SCALE`` apart.

    Parameters
    ----------
    text : str or Path
        A name or folder, perhaps with a colon and a number behind it.

    Returns
    -------
    tuple of str and float
        The name, and the scale, 1 where none is given.
    """
    name, colon, number = str(text).rpartition(":")
    try:
        return (name, float(number)) if colon and name else (str(text), 1.0)
    except ValueError:
        return str(text), 1.0  # the colon is part of the name
