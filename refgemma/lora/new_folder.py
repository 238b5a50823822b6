"""A folder that is made whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_place(place: Path) -> None:
    """Make sure that a folder can be made, before the work is done that fills it."""
    place = place.expanduser()
    if os.path.lexists(place):
        raise FileExistsError(f"{place} exists: expected the name of a folder to make")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"cannot make {place}: {place.parent} is no folder")


def check_room(place: Path, needed: int) -> None:
    """Make sure that the disk has room for a folder."""
    free = shutil.disk_usage(place.parent).free
    if needed > free:
        raise OSError(
            f"there is no room for {needed:,} bytes, the disk of {place.parent} has {free:,} left: make room, or choose"
            " another place"
        )


@contextmanager
def made_beside(place: Path) -> Iterator[Path]:
    """Make a folder that gets its name when it is complete, and is gone after an error or an interruption."""
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
    except OSError as error:
        raise OSError(f"cannot make {place}: {(error.strerror or str(error)).lower()}") from None
    try:
        yield temporary
        check_place(place)  # somebody may have been faster
        temporary.rename(place)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.strerror and str(temporary) in str(error.filename or temporary):
            raise OSError(f"cannot write {place}: {error.strerror.lower()}; nothing was left there") from None
        raise
