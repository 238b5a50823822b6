"""Text from files, standard input and arguments; results to files, whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import IO

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


@contextmanager
def output_file(path: str) -> Iterator[IO[bytes]]:
    """Open a file that appears at its place whole, at the end, or not at all."""
    target = Path(path).resolve()  # a link stays, what it points to is replaced
    in_place = path.startswith("/dev/") or (target.exists() and not target.is_file())
    temporary = target if in_place else target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.is_file():
            target.open("ab").close()  # renaming would replace even a file that is write-protected
        file = temporary.open("ab" if in_place else "wb")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    try:
        with file:
            yield file
        if not in_place:
            temporary.replace(target)
    except BaseException:
        if not in_place:
            temporary.unlink(missing_ok=True)
        raise


def check_place(path: str) -> None:
    """Make sure that a file can be written, before the work is done that gives its content."""
    target = Path(path).resolve()
    if target.is_dir():
        reason = "is a directory"
    elif not target.parent.is_dir():
        reason = "no such folder"
    elif target.exists() and not target.is_file():
        reason = "is a device or a pipe"
    elif not os.access(target if target.exists() else target.parent, os.W_OK):
        reason = "permission denied"
    else:
        return
    raise OSError(f"cannot write {path}: {reason}")


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
