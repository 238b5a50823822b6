"""Fetch a model: resume what was interrupted, verify every file, and show the model only when it is complete.

Files grow in a store, with the ending ``.refgemma-part``. By default store and folder belong to the hub's own cache,
which keeps a file once, under its hash, and links to it from each revision::

    models--google--gemma-2b-it/
        blobs/21dd...b8fd
        snapshots/9642...2bad/model-00001-of-00002.safetensors -> ../../blobs/21dd...b8fd
        refs/main                                                  the text 9642...2bad

For a folder of the user's choice, the store is a hidden folder beside it that is renamed in the end.

Why not ``snapshot_download``: huggingface_hub 2.4.0 deletes the part of a file that has arrived when it is interrupted
(`file_download._download_to_tmp_and_move`; https://github.com/huggingface/huggingface_hub/issues/4196), checks sizes
but no hashes of what arrives, and shows a folder before the model is complete. So `transfer` calls its ``http_get``.

References
----------
Hugging Face, "Understand caching", https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from refgemma.checkpoint.folder import hub_cache, read_folder
from refgemma.checkpoint.load import Progress, check_tensors
from refgemma.config import read_config
from refgemma.errors import InputError
from refgemma.files.atomic import whole_file
from refgemma.hub.offer import Offer, RemoteFile, client, transfer

# Shows progress on the named work: yields ``progress(done, total)`` in bytes, or None.
Bar: TypeAlias = Callable[[str], AbstractContextManager[Progress | None]]

_BLOCK = 2**20  # bytes


@dataclass(frozen=True)
class Place:
    """Where a model goes, and how much of it is there."""

    offer: Offer
    folder: Path  # where the model will be
    store: Path  # where its files are collected
    in_cache: bool  # whether both belong to the hub's cache

    def path(self, file: RemoteFile) -> Path:
        """Where a complete file is, or will be: in the folder, or else in the store."""
        placed = self.folder / file.name
        return placed if placed.is_file() else self.store / (file.digest if self.in_cache else file.name)

    def part(self, file: RemoteFile) -> Path:
        """Where an incomplete file is."""
        path = self.path(file)
        return path.with_name(f"{path.name}.refgemma-part")

    @property
    def missing(self) -> int:
        """Bytes still to be fetched."""
        sizes = [(file.size, _size_of(self.path(file)) or _size_of(self.part(file))) for file in self.offer.files]
        return sum(size - (arrived if arrived <= size else 0) for size, arrived in sizes)

    def to_remove(self, path: Path) -> Path:
        """What the user must remove so that a damaged file is fetched again."""
        return path.resolve() if self.in_cache else self.folder


def choose_place(offer: Offer, to: str | Path | None = None) -> Place:
    """Choose a folder, or the hub's cache, and check it; nothing is written."""
    if to is None:
        repository = hub_cache() / f"models--{offer.name.replace('/', '--')}"
        place = Place(offer, repository / "snapshots" / offer.commit, repository / "blobs", in_cache=True)
    else:
        folder = Path(to).expanduser().resolve()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file: expected a folder to make, or an empty one")
        lacking = [file.name for file in offer.files if not (folder / file.name).is_file()]
        if folder.is_dir() and any(folder.iterdir()) and lacking:
            raise InputError(
                f"{folder} is not empty, and lacks {', '.join(lacking)}: give a folder that is empty or does not exist"
                " yet"
            )
        place = Place(offer, folder, folder.with_name(f".{folder.name}.incomplete"), in_cache=False)
    for file in offer.files:
        path = place.path(file)
        if path.is_file() and _size_of(path) != file.size:
            raise InputError(
                f"{path} has {_size_of(path):,} bytes, expected {file.size:,}: remove {place.to_remove(path)} and run"
                " it again"
            )
    free = shutil.disk_usage(next(parent for parent in place.store.parents if parent.exists())).free
    if place.missing > free:
        raise OSError(
            f"no room for {place.missing:,} bytes, the disk of {place.store} has {free:,} left: make room, or"
            " choose another place with --to FOLDER or with HF_HUB_CACHE"
        )
    return place


def fetch(place: Place, bar: Bar = lambda what: nullcontext()) -> Path:
    """Fetch what is missing, verify everything, and put the model into its folder."""
    if place.missing:
        place.store.mkdir(parents=True, exist_ok=True)
    with _locked(place):
        with bar(f"fetching {place.offer.name}") as progress:
            _fetch_parts(place, progress)
        with bar(f"verifying {place.offer.name}") as progress:
            _verify(place, progress)
        if place.in_cache:
            _publish_in_cache(place)
        elif not (place.folder / "config.json").is_file():
            _check_model(place.store)
            if place.folder.is_dir():
                place.folder.rmdir()  # empty, but not every system renames over a folder
            place.store.replace(place.folder)
    return place.folder


def _fetch_parts(place: Place, progress: Progress | None) -> None:
    """Append to each part until it has the size of its file."""
    total, done = place.missing, 0
    for file in place.offer.files:
        part = place.part(file)
        if place.path(file).is_file():
            continue
        if _size_of(part) > file.size:
            part.unlink()
        first = _size_of(part)

        def report(size: int, *, start: int = done - first) -> None:
            if progress:
                progress(max(0, start + size), total)

        try:
            with _Watched(part, report) as out:
                transfer(file, out)
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(f"cannot write {part}: {error.strerror}; what has arrived is kept, run it again") from None
        done += file.size - first


def _verify(place: Place, progress: Progress | None) -> None:
    """Compare every file with its hash, and rename the parts that are complete."""
    done = 0
    for file in place.offer.files:
        path, part = place.path(file), place.part(file)
        found = path if path.is_file() else part
        git = b"blob %d\0" % file.size  # git hashes this header before the contents
        digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(git, usedforsecurity=False)
        with found.open("rb") as opened:
            while block := opened.read(_BLOCK):
                digest.update(block)
                done += len(block)
                if progress:
                    progress(done, place.offer.nbytes)
        right = digest.hexdigest() == file.digest
        if found == path and not right:
            raise OSError(
                f"{path} is damaged, its hash differs from the hub's: remove {place.to_remove(path)} and run it again"
            )
        if not right:
            part.unlink()
            raise OSError(f"{file.name} arrived damaged and was removed: run it again")
        if found == part:
            part.replace(path)


def _publish_in_cache(place: Place) -> None:
    """Link the files into the folder of their revision, check the model, and make the revision the newest."""
    for file in reversed(place.offer.files):  # config.json, by which a folder is found, comes last
        path, link = place.path(file), place.folder / file.name
        if path == link:
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(os.path.relpath(path, link.parent))
        except OSError:  # without links, the file itself goes there
            path.replace(link)
    _check_model(place.folder)
    newest = place.folder.parents[1] / "refs" / "main"
    newest.parent.mkdir(exist_ok=True)
    with whole_file(newest) as ref:
        ref.write(place.offer.commit.encode())


def _check_model(folder: Path) -> None:
    check_tensors(read_folder(folder), read_config(folder), folder)


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


class _Watched(io.BufferedWriter):
    """A file opened for appending that reports its size whenever it grows."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "a"))
        self._report = report

    def write(self, data: Any, /) -> int:
        count = super().write(data)
        self._report(self.tell())
        return count


@contextmanager
def _locked(place: Place) -> Iterator[None]:
    """Keep other processes from appending to the same parts."""
    lock = place.store.with_name(f"{place.store.name}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(client("utils").WeakFileLock(lock, timeout=0.1))
        except TimeoutError:
            raise OSError(f"another process is downloading {place.offer.name}: wait until it ends") from None
        yield
    lock.unlink(missing_ok=True)  # not after an error: harmless only when nothing is missing
