"""Whole files or none, whole folders or none: written under another name beside their place, and renamed at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of writing: they name no file


@contextmanager
def whole_file(path: str | Path, *, devices: bool = False) -> Iterator[IO[bytes]]:
    """Open a file that appears, or replaces the old one, when it is complete.

    Devices and pipes cannot be replaced: with `devices` they are written to directly, else refused.
    """
    check_file_place(path, devices=devices)
    if devices and _is_device(path):
        try:
            device = Path(path).open("ab")  # noqa: SIM115  closed below
        except OSError as error:
            raise OSError(f"cannot write {path}: {str(error.strerror).lower()}") from None
        with device:
            yield device
        return
    target = Path(path).resolve()  # a link stays, the file that it points to is replaced
    with _renamed(path, target) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """Make a folder that gets its name when it is complete."""
    with _renamed(place, place) as temporary:
        temporary.mkdir()
        yield temporary
        check_folder_place(place)  # another process may have been faster


@contextmanager
def _renamed(path: str | Path, target: Path) -> Iterator[Path]:
    """Rename what is written beside its place; remove it after an error or an interruption."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror:
            named = str(error.filename or "").startswith(str(temporary))
            if named or (error.filename is None and error.errno in _DISK_ERRORS):
                raise OSError(f"cannot write {path}: {error.strerror.lower()}; nothing was written") from None
        raise


def check_file_place(path: str | Path, *, devices: bool = False) -> None:
    """Refuse a place where no file can be written, before the work is done that gives its content."""
    target = Path(path).resolve()
    if devices and _is_device(path):
        return
    if target.is_dir():
        reason = "is a directory"
    elif not target.parent.is_dir():
        reason = "no such folder"
    elif target.exists() and not target.is_file():
        reason = "is a device or a pipe: expected the name of a file"
    elif not os.access(target if target.exists() else target.parent, os.W_OK):
        reason = "permission denied"  # renaming would replace even a file that is write-protected
    else:
        return
    raise OSError(f"cannot write {path}: {reason}")


def check_folder_place(place: Path) -> None:
    """Refuse a place where no folder can be made, before the work is done that fills it."""
    if os.path.lexists(place):
        raise FileExistsError(f"{place} exists: expected the name of a folder to make")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"cannot make {place}: {place.parent} is not a folder")


def check_room(place: Path, needed: int) -> None:
    """Refuse a disk that has no room for `needed` bytes."""
    free = shutil.disk_usage(place.parent).free
    if needed > free:
        raise OSError(
            f"there is no room for {needed:,} bytes, the disk of {place.parent} has {free:,} left: make room, or choose"
            " another place"
        )


def _is_device(path: str | Path) -> bool:
    target = Path(path)
    opened = str(path).startswith(("/dev/std", "/dev/fd/"))  # perhaps a file that the shell has opened
    return opened or (target.exists() and not target.is_file() and not target.is_dir())
