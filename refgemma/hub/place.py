"""Where a model from a hub goes, and what of it is there already.

Files come together in a store, each growing in a file with the ending ``.refgemma-part``. By default store and folder
belong to the hub's own cache, where a file is stored under its hash, once for all revisions, and the folder holds
links::

    models--google--gemma-2b-it/
        blobs/21dd...b8fd
        snapshots/9642...2bad/model-00001-of-00002.safetensors -> ../../blobs/21dd...b8fd
        refs/main                                                  the text 9642...2bad

For a folder of the user's choice, the store is a hidden folder beside it, which becomes it in the end.

References
----------
Hugging Face, "Understand caching", https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from refgemma.checkpoint.folder import hub_cache
from refgemma.errors import InputError
from refgemma.hub.client import RemoteFile
from refgemma.hub.offer import Offer


@dataclass(frozen=True)
class Place:
    """Place of a model."""

    offer: Offer  # the model
    folder: Path  # where it will be
    store: Path  # where its files come together
    in_cache: bool  # whether both belong to the hub's cache

    def path(self, file: RemoteFile) -> Path:
        """Find a file: in the folder, or else where it is, or will be, in the store."""
        placed = self.folder / file.name
        return placed if placed.is_file() else self.store / (file.digest if self.in_cache else file.name)

    def part(self, file: RemoteFile) -> Path:
        """Find what has arrived of a file that is not complete."""
        path = self.path(file)
        return path.with_name(f"{path.name}.refgemma-part")

    @property
    def missing(self) -> int:
        """Bytes still to be fetched."""
        return sum(file.size - self._arrived(file) for file in self.offer.files)

    def culprit(self, path: Path) -> Path:
        """What the user has to remove to have a damaged file fetched again."""
        return path.resolve() if self.in_cache else self.folder

    def _arrived(self, file: RemoteFile) -> int:
        size = size_of(self.path(file)) or size_of(self.part(file))
        return size if size <= file.size else 0


def choose_place(offer: Offer, to: str | Path | None = None) -> Place:
    """Find a place for a model; nothing is written."""
    if to is None:
        repository = hub_cache() / f"models--{offer.name.replace('/', '--')}"
        place = Place(offer, repository / "snapshots" / offer.commit, repository / "blobs", in_cache=True)
    else:
        folder = Path(to).expanduser().resolve()
        _check_folder(folder, offer)
        place = Place(offer, folder, folder.with_name(f".{folder.name}.incomplete"), in_cache=False)
    for file in offer.files:
        path = place.path(file)
        if path.is_file() and size_of(path) != file.size:
            raise InputError(
                f"{path} has {size_of(path):,} bytes, expected {file.size:,}: remove {place.culprit(path)} and run it"
                " again"
            )
    free = shutil.disk_usage(next(parent for parent in place.store.parents if parent.exists())).free
    if place.missing > free:
        raise OSError(
            f"there is no room for {place.missing:,} bytes, the disk of {place.store} has {free:,} left: make room, or"
            " choose another place with --to FOLDER or with HF_HUB_CACHE"
        )
    return place


def size_of(path: Path) -> int:
    """Size of a file."""
    return path.stat().st_size if path.is_file() else 0


def _check_folder(folder: Path, offer: Offer) -> None:
    """Refuse to touch what is not this model."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: expected a folder to make, or an empty one")
    lacking = [file.name for file in offer.files if not (folder / file.name).is_file()]
    if folder.is_dir() and any(folder.iterdir()) and lacking:
        raise InputError(
            f"{folder} is not empty, and lacks {', '.join(lacking)}: give a folder that is empty or does not exist yet"
        )
