"""Finetunes over HTTP: create one, upload its two files one by one, list."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import asdict
from pathlib import Path

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.server.finetunes import Finetunes
from refgemma.workers_ai.server.http import read_chunks, read_json, reply, success
from refgemma.workers_ai.server.limits import FORM_FIELD_BYTES, UPLOAD_BYTES, UPLOADS


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
