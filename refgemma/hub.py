"""Models from a Hugging Face hub: what a hub has of a model, asked before anything is fetched, and the download.

The only module that opens a connection. huggingface_hub (extra ``hub``) knows endpoint, token, proxies and retries; it
is imported on first use. Each of its errors becomes one sentence that says what to do.

A download resumes what was interrupted, verifies every file, and shows the model only when it is complete. Files grow
in a store, with the ending ``.refgemma-part``. By default store and folder belong to the hub's own cache, which keeps a
file once, under its hash, and links to it from each revision::

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
import importlib
import importlib.util
import io
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias
from urllib.parse import quote

from refgemma.checkpoint.folder import INDEX, SINGLE, hub_cache, parse_index, read_folder
from refgemma.checkpoint.load import Progress, check_tensors
from refgemma.config import Config, config_from_hf, json_object, read_config
from refgemma.errors import InputError
from refgemma.files.atomic import whole_file

# Licences that model cards name without a link.
_TERMS = {"gemma": "https://ai.google.dev/gemma/terms", "apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0"}
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_TIMEOUT = 30  # seconds
_BLOCK = 2**20  # bytes

# Shows progress on the named work: yields ``progress(done, total)`` in bytes, or None.
Bar: TypeAlias = Callable[[str], AbstractContextManager[Progress | None]]


class RemoteFile(NamedTuple):
    """A file on a hub."""

    page: str
    commit: str
    name: str
    size: int
    digest: str  # SHA-256 of a large file, git's SHA-1 of a small one


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A model that a hub has and refgemma can run."""

    name: str  # ``OWNER/NAME``, as the hub writes it
    commit: str  # the newest of the main branch
    licence: str  # according to the model card
    terms: str  # where to read it
    gated: bool  # whether the hub wants it accepted first
    config: Config
    files: tuple[RemoteFile, ...]  # configuration, tokenizer, weights in safetensors; nothing pickled

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)


def look_up(name: str) -> Offer:
    """Ask https://huggingface.co, or the hub that ``HF_ENDPOINT`` names, for a model."""
    full = name if "/" in name else f"google/{name}"
    if not _NAME.fullmatch(full):
        raise InputError(f"{name!r} is not the name of a model: expected OWNER/NAME, such as google/gemma-2b-it")
    if client("constants").HF_HUB_OFFLINE:
        raise ConnectionError(f"HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it to download {full}")
    api = client("hf_api").HfApi(library_name="refgemma")
    with _plain_errors(f"{api.endpoint}/{full}"):
        about = api.model_info(full, files_metadata=True, timeout=_TIMEOUT)
    page = f"{api.endpoint}/{about.id}"
    files = _needed_files(about, page)
    try:
        config = config_from_hf(json_object(_read(files[0]), "its config.json", "that of a Gemma model"))
    except InputError as error:
        raise InputError(f"{about.id} is not supported: {error}") from None
    card = about.card_data or {}
    licence = str(card.get("license_name") or card.get("license") or "not stated")
    link = str(card.get("license_link") or _TERMS.get(licence) or "")
    return Offer(
        name=about.id,
        commit=about.sha,
        licence=licence,
        terms=link if link.startswith("https://") else page,
        gated=bool(about.gated),
        config=config,
        files=files,
    )


def _needed_files(about: Any, page: str) -> tuple[RemoteFile, ...]:
    """Configuration first, tokenizer, and weights: where there are two sets, the one that `read_folder` would take."""
    there = {sibling.rfilename: sibling for sibling in about.siblings or ()}

    def file(name: str) -> RemoteFile:
        size, large = there[name].size, there[name].lfs
        digest = large.sha256 if large else there[name].blob_id
        # Hashes become file names, so they are checked.
        if not _HASH.fullmatch(str(digest)) or not _HASH.fullmatch(str(about.sha)) or not isinstance(size, int):
            raise InputError(
                f"{page} describes {name} by commit {about.sha!r}, hash {digest!r} and size {size!r}: expected two"
                " hashes and a number of bytes"
            )
        return RemoteFile(page, about.sha, name, size, digest)

    weights = [SINGLE]
    if INDEX in there:
        weights = [INDEX, *sorted(set(parse_index(_read(file(INDEX)), f"{about.id}: {INDEX}").values()))]
    wanted = ["config.json", "tokenizer.model", *weights]
    missing = [name for name in wanted if name not in there]
    if missing:
        other = sorted(name for name in there if name.endswith((".gguf", ".bin", ".ckpt", ".pt", ".msgpack")))
        instead = f" (there is {textwrap.shorten(', '.join(other), 100)})" if other else ""
        raise InputError(
            f"{about.id} lacks {', '.join(missing)}{instead}: expected a model in Hugging Face layout with its weights"
            " in safetensors, such as google/gemma-2b-it"
        )
    return tuple(file(name) for name in (*wanted, "generation_config.json") if name in there)


def client(module: str) -> Any:
    """Import a module of huggingface_hub, which is optional and large."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError('downloading takes huggingface_hub, which is not installed: pip install "refgemma[hub]"')
    return importlib.import_module(f"huggingface_hub.{module}")


def transfer(file: RemoteFile, out: IO[bytes]) -> None:
    """Append to `out` what it lacks of a file."""
    headers = client("utils").build_hf_headers(library_name="refgemma")
    headers["Accept-Encoding"] = "identity"  # offsets and sizes are those of the file, not of a compressed one
    url = f"{file.page}/resolve/{file.commit}/{quote(file.name)}"
    with _plain_errors(file.page), _without_its_progress_bar():
        client("file_download").http_get(url, out, resume_size=out.tell(), headers=headers, expected_size=file.size)


def _read(file: RemoteFile) -> bytes:
    buffer = io.BytesIO()
    transfer(file, buffer)
    return buffer.getvalue()


@contextmanager
def _plain_errors(page: str) -> Iterator[None]:
    """Turn whatever fails between here and the page of a model into one sentence."""
    endpoint, owner, name = page.rsplit("/", 2)
    errors = client("errors")
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(
            f"{owner}/{name} is gated: accept its licence at {page}, then log in to that account with `hf auth login`"
            " or set HF_TOKEN to a token of it"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{endpoint} has no model {owner}/{name}, or it is private: check the name, or log in with `hf auth login`"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise PermissionError(
                f"{endpoint} refuses the token: log in with `hf auth login`, or set HF_TOKEN to a valid one"
            ) from None
        raise ConnectionError(
            f"{endpoint} answered {status} for {owner}/{name}{_detail(error.server_message)}: try again later"
        ) from None
    except errors.HFValidationError as error:
        raise InputError(f"{owner}/{name} is not the name of a model{_detail(error)}: expected OWNER/NAME") from None
    except Exception as error:
        # Errors of the HTTP library, which differ between versions. Only a full disk is something else.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ConnectionError(
            f"the connection to {endpoint} failed{_detail(error)}: check the network and run it again"
        ) from error


def _detail(message: object) -> str:
    """In parentheses, and shortened: some messages are pages."""
    text = textwrap.shorten(str(message or ""), 160)
    return f" ({text})" if text else ""


@contextmanager
def _without_its_progress_bar() -> Iterator[None]:
    """Keep huggingface_hub from drawing a second bar, unless HF_HUB_DISABLE_PROGRESS_BARS decides."""
    bars, utils = "huggingface_hub.http_get", client("utils")
    if client("constants").HF_HUB_DISABLE_PROGRESS_BARS is not None or utils.are_progress_bars_disabled(bars):
        yield
        return
    utils.disable_progress_bars(bars)
    try:
        yield
    finally:
        utils.enable_progress_bars(bars)


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
