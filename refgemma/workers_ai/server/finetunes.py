"""Finetunes: created, uploaded and listed over HTTP, kept on disk in one folder each.

A folder is named by id, and has a description and the adapter's two files.

No text from a user is ever part of a path: folders are named by ids made here, files by the two fixed names. A file is
written to a temporary folder, checked there together with the file that is there already, and then renamed.

Readers never wait: lists and names are replaced whole. One lock serialises creation, and one per finetune serialises
the uploads of its two files, since the second is checked together with the first.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import tempfile
import threading
import uuid
import warnings
import weakref
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from refgemma.errors import InputError
from refgemma.lora import read
from refgemma.workers_ai.ai import AI
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.schema import short
from refgemma.workers_ai.server.adapter_check import FILES, check, fits
from refgemma.workers_ai.server.http import read_chunks, read_json, reply, success
from refgemma.workers_ai.server.limits import DESCRIPTION, FINETUNES, FORM_FIELD_BYTES, NAME, UPLOAD_BYTES, UPLOADS

ABOUT = "finetune.json"
STAGE = ".new-"  # prefix of temporary folders
RESERVED = "cf-public-"  # prefix of the names of Cloudflare's own adapters
NAME_PATTERN = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME - 1}}}"
_STARTUP_IDS = uuid.UUID("5c2c2f6e-9e52-4a83-9a5c-5d8f0f0d6a01")


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """The description of a finetune."""

    id: str  # a UUID
    created_at: str  # ISO 8601, UTC
    model: str  # hosted model that it is for
    modified_at: str  # ISO 8601, UTC
    name: str
    public: bool = False  # whether it is in the public list
    description: str = ""


class Finetunes:
    """Uploaded finetunes, and those that the server was started with."""

    def __init__(self, ai: AI, folder: Path | None = None) -> None:
        self._ai = ai
        self._folder = Path(tempfile.mkdtemp(prefix="refgemma-finetunes-")) if folder is None else folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._kept = folder is not None
        if not self._kept:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        for stage in self._folder.glob(f"{STAGE}*"):  # of a process that was killed
            shutil.rmtree(stage, ignore_errors=True)
        self._creating = threading.Lock()
        self._uploads: dict[str, threading.Lock] = {}  # by id; a finetune from the start of the server has none
        self._all: tuple[Finetune, ...] = ()  # those from the start, then the oldest first
        self._by_key: dict[str, Finetune] = {}  # by id and by name
        for finetune in [_from_start(name, ai) for name in ai.loras]:
            ai.loras[finetune.id] = ai.loras[finetune.name]
            self._add(finetune)
        for finetune in self._stored():
            self._add(finetune, uploaded=True)
            self._serve(finetune)

    def every(self, *, public: bool = False) -> list[dict[str, Any]]:
        """List all finetunes, or the public ones."""
        return [asdict(finetune) for finetune in self._all if finetune.public or not public]

    def create(self, fields: Any) -> Finetune:
        """Create a finetune without files."""
        now = _now()
        finetune = Finetune(id=str(uuid.uuid4()), created_at=now, modified_at=now, **_checked(fields))
        if finetune.model not in self._ai.models:
            served = " and ".join(self._ai.models)
            raise AiError(5005, f"Model {short(finetune.model)} does not support LoRA here: expected {served}")
        with self._creating:
            if finetune.name in self._by_key:
                raise AiError(5006, f"there is a finetune {finetune.name!r}: expected another name")
            if len(self._uploads) >= FINETUNES:
                raise AiError(3040, f"there are {FINETUNES} finetunes, as many as there may be")
            with self._staged() as stage:
                (stage / ABOUT).write_text(json.dumps(asdict(finetune), indent=1), encoding="utf-8")
                stage.rename(self._folder / finetune.id)
            self._add(finetune, uploaded=True)
        return finetune

    def add(self, key: str, file_name: str, source: Path) -> None:
        """Add one of the two files; the second makes the finetune usable."""
        finetune = self._by_key.get(key)
        if finetune is None or finetune.id not in self._uploads:
            raise AiError(3037, f"Finetune {short(key)} not found")
        if file_name not in FILES:
            raise AiError(5006, f"file_name is {short(file_name)!r}: expected {' or '.join(FILES)}")
        folder = self._folder / finetune.id
        with self._uploads[finetune.id], self._staged() as stage:
            if (folder / file_name).exists():
                raise AiError(5006, f"{file_name} is there already: files are never replaced, so make another finetune")
            shutil.move(source, stage / file_name)
            for other in set(FILES) - {file_name}:
                if (folder / other).exists():
                    _link(folder / other, stage / other)
            check(stage, self._ai.models.get(finetune.model), finetune.model)
            (stage / file_name).rename(folder / file_name)
        self._serve(finetune)

    def check_complete(self, key: str) -> None:
        """Refuse a finetune that lacks files; one that does not exist passes."""
        finetune = self._by_key.get(key)
        missing = [] if finetune is None else self._missing(finetune)
        if missing:
            raise AiError(3039, f"Finetune {short(key)} is missing required files: {' and '.join(missing)}")

    def check_model(self, key: str | None, model: str) -> None:
        """Refuse a finetune that was uploaded for another model."""
        finetune = None if key is None else self._by_key.get(key)
        if finetune is not None and finetune.id in self._uploads and finetune.model != model:
            raise AiError(5006, f"Finetune {short(finetune.name)} was made for {finetune.model}, not for {model}")

    def close(self) -> None:
        """Remove the temporary folder: a process that ends by a signal runs no finalizers."""
        if not self._kept:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _add(self, finetune: Finetune, *, uploaded: bool = False) -> None:
        if uploaded:
            self._uploads[finetune.id] = threading.Lock()
        self._by_key[finetune.id] = self._by_key[finetune.name] = finetune
        self._all = (*self._all, finetune)

    def _missing(self, finetune: Finetune) -> list[str]:
        if finetune.id not in self._uploads:
            return []
        return [name for name in FILES if not (self._folder / finetune.id / name).exists()]

    def _serve(self, finetune: Finetune) -> None:
        """Make a complete finetune available to requests."""
        if self._missing(finetune):
            return
        try:
            adapter = read(self._folder / finetune.id)
        except (OSError, InputError) as error:
            warnings.warn(f"finetune {finetune.name} cannot be used: {error}", stacklevel=2)
            return
        self._ai.loras[finetune.id] = self._ai.loras[finetune.name] = adapter

    def _stored(self) -> Iterator[Finetune]:
        """Yield the finetunes of earlier runs, the oldest first; unreadable ones stay on disk, with a warning."""
        found = []
        for about in self._folder.glob(f"*/{ABOUT}"):
            try:
                finetune = Finetune(**json.loads(about.read_text(encoding="utf-8")))
                _check_stored(finetune, about.parent.name)
                found.append(finetune)
            except (OSError, ValueError, TypeError, RecursionError) as error:
                warnings.warn(f"{about} is left out: {error}", stacklevel=2)
        for finetune in sorted(found, key=lambda finetune: (finetune.created_at, finetune.id)):
            if other := self._by_key.get(finetune.name):
                about = self._folder / finetune.id / ABOUT
                why = f"its name {finetune.name!r} is that of {other.id}, which is older or was given at the start"
                warnings.warn(f"{about} is left out: {why}", stacklevel=2)
            else:
                yield finetune

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=self._folder))
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _from_start(name: str, ai: AI) -> Finetune:
    """Describe an adapter that the server was started with."""
    adapter = ai.loras[name]
    model = next((model for model in ai.models if fits(adapter, ai.models[model])), None)
    if model is None:
        raise InputError(f"adapter {name!r} ({adapter.folder}) fits none of the models: {', '.join(ai.models)}")
    now = _now()
    return Finetune(
        id=str(uuid.uuid5(_STARTUP_IDS, name)),
        created_at=now,
        modified_at=now,
        model=model,
        name=name,
        public=True,
        description=f"given when the server was started: {adapter.name}",
    )


def _checked(fields: Any) -> Mapping[str, Any]:
    """Validate the fields of a new finetune."""
    if not isinstance(fields, dict):
        raise AiError(5006, "the body is not an object: expected model, name and perhaps description and public")
    name, description, public = fields.get("name"), fields.get("description") or "", fields.get("public") or False
    if not isinstance(fields.get("model"), str):
        raise AiError(5006, "required properties at '/' are 'model,name'")
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        wanted = f"1 to {NAME} letters, digits, dots, hyphens and underscores, the first a letter or digit"
        raise AiError(5006, f"'/name' is {short(str(name))!r}: expected {wanted}")
    if name.lower().startswith(RESERVED):
        raise AiError(5006, f"'/name' begins with {RESERVED}, which is reserved: expected another name")
    if not isinstance(description, str) or len(description) > DESCRIPTION:
        raise AiError(5006, f"'/description' must be a text of at most {DESCRIPTION} characters")
    if not isinstance(public, bool):
        raise AiError(5006, "'/public' must be true or false")
    description = description.encode("utf-8", "replace").decode()  # UTF-8 has no unpaired surrogates
    return {"model": fields["model"], "name": name, "description": description, "public": public}


def _check_stored(finetune: Finetune, folder: str) -> None:
    """Refuse a stored description that no server wrote."""
    if not all(isinstance(value, bool if name == "public" else str) for name, value in asdict(finetune).items()):
        raise InputError("it holds a value of the wrong type")
    if finetune.id != folder or not re.fullmatch(NAME_PATTERN, finetune.name):
        raise InputError("its id is not the name of its folder, or its name is not a valid name of a finetune")


def _now() -> str:
    return datetime.now(UTC).isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00")


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def routes(finetunes: Finetunes) -> list[Route]:
    """Make the routes."""
    uploads = asyncio.Semaphore(UPLOADS)

    async def create(http: HttpRequest) -> Response:
        return success(asdict(await asyncio.to_thread(finetunes.create, await read_json(http))))

    async def every(http: HttpRequest) -> Response:
        return success(finetunes.every())

    async def public(http: HttpRequest) -> Response:
        return success(finetunes.every(public=True))

    async def upload(http: HttpRequest) -> Response:
        if uploads.locked():
            raise AiError(3040, f"{UPLOADS} uploads are in progress: try again later")
        async with uploads:
            file_name, path = await _form(http)
            try:
                await asyncio.to_thread(finetunes.add, http.path_params["finetune"], file_name, path)
            finally:
                path.unlink(missing_ok=True)
        return reply({"success": True})

    paths = ("/finetunes", "/finetunes/")  # with a slash in the guide, without in Cloudflare's own tool
    return [
        *(Route(path, create, methods=["POST"]) for path in paths),
        *(Route(path, every, methods=["GET"]) for path in paths),
        Route("/finetunes/public", public, methods=["GET"]),
        *(Route(f"/finetunes/{{finetune}}/finetune-assets{end}", upload, methods=["POST"]) for end in ("", "/")),
    ]


async def _form(http: HttpRequest) -> tuple[str, Path]:
    """Read the two fields of an upload: the file's name, and its content, saved to a temporary file."""
    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise AiError(5006, "the body is not a multipart form: expected its fields file_name and file")

    async def bounded() -> AsyncGenerator[bytes, None]:
        async for chunk in read_chunks(http, UPLOAD_BYTES):
            yield chunk
        yield b""

    parser = MultiPartParser(http.headers, bounded(), max_files=1, max_fields=8, max_part_size=FORM_FIELD_BYTES)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeError, ValueError) as error:
        what = error.message if isinstance(error, MultiPartException) else "it is damaged"
        raise AiError(5006, f"the form cannot be read: {what}") from None
    try:
        file_name, file = form.get("file_name"), form.get("file")
        if not isinstance(file_name, str) or not isinstance(file, UploadFile):
            raise AiError(5006, "required properties at '/' are 'file_name,file'")
        return file_name, await asyncio.to_thread(_saved, file)
    finally:
        await form.close()


def _saved(file: UploadFile) -> Path:
    with tempfile.NamedTemporaryFile(prefix="refgemma-upload-", delete=False) as copy:
        while piece := file.file.read(2**20):
            copy.write(piece)
    return Path(copy.name)
