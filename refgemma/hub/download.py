"""Fetch what is missing, go on where an interrupted download stopped, and trust nothing unverified.

Files get their place at the very end, once each is what the hub says it is and all of them together are a model. So a
folder holds the whole model or is not there.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

from refgemma.checkpoint.folder import read_folder
from refgemma.checkpoint.load import Progress, check_tensors
from refgemma.config import read_config
from refgemma.hub.client import RemoteFile, client, transfer
from refgemma.hub.place import Place, size_of

# A context manager that shows how far the named work is: it yields ``progress(done, total)`` in bytes, or None.
Bar: TypeAlias = Callable[[str], AbstractContextManager[Progress | None]]

_BLOCK = 2**20  # bytes


def fetch(place: Place, bar: Bar = lambda what: nullcontext()) -> Path:
    """Fetch what is missing, verify everything, and put the model into its place."""
    if place.missing:
        place.store.mkdir(parents=True, exist_ok=True)
    with _alone(place):
        with bar(f"fetching {place.offer.name}") as progress:
            _fetch_parts(place, progress)
        with bar(f"verifying {place.offer.name}") as progress:
            _verify(place, progress)
        if place.in_cache:
            _publish_in_cache(place)
        elif not (place.folder / "config.json").is_file():
            _check_model(place.store)
            if place.folder.is_dir():
                place.folder.rmdir()  # it is empty; not every system renames over a folder
            place.store.replace(place.folder)
    return place.folder


def _fetch_parts(place: Place, progress: Progress | None) -> None:
    """Let the part of each file that is not there yet grow to its size."""
    total, done = place.missing, 0
    for file in place.offer.files:
        part = place.part(file)
        if place.path(file).is_file():
            continue
        if size_of(part) > file.size:
            part.unlink()
        first = size_of(part)

        def report(size: int, *, start: int = done - first) -> None:
            if progress:
                progress(max(0, start + size), total)

        try:
            with _Watched(part, report) as out:
                transfer(file, out)
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(f"cannot write {part}: {error.strerror}; what is there is kept, run it again") from None
        done += file.size - first


def _verify(place: Place, progress: Progress | None) -> None:
    """Compare every file with its hash; a part that is right loses its ending."""
    done = 0
    for file in place.offer.files:
        path, part = place.path(file), place.part(file)
        found = path if path.is_file() else part
        digest = _new_digest(file)
        with found.open("rb") as opened:
            while block := opened.read(_BLOCK):
                digest.update(block)
                done += len(block)
                if progress:
                    progress(done, place.offer.nbytes)
        right = digest.hexdigest() == file.digest
        if found == path and not right:
            raise OSError(
                f"{path} is damaged, its hash is not what the hub says: remove {place.culprit(path)} and run it again"
            )
        if not right:
            part.unlink()
            raise OSError(f"{file.name} arrived damaged and was removed: run it again")
        if found == part:
            part.replace(path)


def _publish_in_cache(place: Place) -> None:
    """Link the files into the folder of their revision, and only then say that it is the newest."""
    for file in reversed(place.offer.files):  # config.json, by which a folder is found, comes last
        path, link = place.path(file), place.folder / file.name
        if path == link:
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(os.path.relpath(path, link.parent))
        except OSError:  # where there are no links, the file itself stands there
            path.replace(link)
    _check_model(place.folder)
    newest = place.folder.parents[1] / "refs" / "main"
    newest.parent.mkdir(exist_ok=True)
    temporary = newest.with_name(f".main.{os.getpid()}.tmp")
    temporary.write_text(place.offer.commit, encoding="utf-8")
    temporary.replace(newest)


def _check_model(folder: Path) -> None:
    """See that the tensors are those of the configuration; no number is read."""
    check_tensors(read_folder(folder), read_config(folder), folder)


def _new_digest(file: RemoteFile) -> Any:
    """SHA-256, or git's hash of a file: SHA-1 over a header and the contents."""
    if len(file.digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


class _Watched(io.BufferedWriter):
    """A file to append to that tells its size whenever it grows."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "a"))
        self._report = report

    def write(self, data: Any, /) -> int:
        count = super().write(data)
        self._report(self.tell())
        return count


@contextmanager
def _alone(place: Place) -> Iterator[None]:
    """Keep other processes from appending to the same parts."""
    lock = place.store.with_name(f"{place.store.name}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(client("utils").WeakFileLock(lock, timeout=0.1))
        except TimeoutError:
            raise OSError(f"another process is downloading {place.offer.name}: wait until it has ended") from None
        yield
    lock.unlink(missing_ok=True)  # not after an error: only when nothing is missing can it do no harm
