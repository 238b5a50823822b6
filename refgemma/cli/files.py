"""Text from files, standard input and arguments."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

from refgemma.errors import InputError


def read_text(path: str) -> str:
    """Read a text exactly, its last newline included."""
    if path == "-":
        return decode(sys.stdin.buffer.read(), "standard input")
    try:
        return decode(Path(path).read_bytes(), path)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from None


def text_argument(text: str) -> str:
    """Text of an argument, whatever the locale."""
    return decode(os.fsencode(text), "the argument")


def decode(data: bytes, source: str) -> str:
    """Decode UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; expected text in UTF-8"
        ) from None


def check_apart(read: Mapping[str, str | Path | None], written: Mapping[str, str | Path | None]) -> None:
    """Make sure that no file is written twice, and none that was read."""
    files = [(what, Path(path)) for what, path in (*written.items(), *read.items()) if path is not None]
    for (what, path), (other, elsewhere) in combinations(files, 2):
        if what in written and _same_file(path, elsewhere):
            raise InputError(f"{what} and {other} are the same file, {path}: expected a file of its own for each")


def _same_file(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():  # links, and file systems that do not tell upper from lower case
        return one.is_file() and one.samefile(other)
    return one.resolve() == other.resolve()
