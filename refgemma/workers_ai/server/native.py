"""The service's own interface: ``…/ai/run/{model}``, ``…/ai/models/search`` and ``…/ai/models/schema``.

A run is answered in the REST envelope or as a stream of events.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from refgemma.workers_ai.ai import AI
from refgemma.workers_ai.answer import DONE, SCHEMA, Chunks, result, sse
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.pages import page
from refgemma.workers_ai.request import context_length
from refgemma.workers_ai.schema import short
from refgemma.workers_ai.server.http import parse, read_body, success
from refgemma.workers_ai.server.service import Service
from refgemma.workers_ai.server.streaming import Answer, EventStream

TASK = "Text Generation"
MOST_PER_PAGE = 100
_IDS = uuid.UUID("0b3f4f0e-5c1f-4d5b-9d0c-1c54a6d9a002")


def routes(service: Service) -> list[Route]:
    """Make the routes."""
    ai = service.ai

    async def run(http: HttpRequest) -> Response | ASGIApp:
        body, model = await read_body(http), http.path_params["model"]
        prepared = await service.preparation.run(lambda: service.prepare(model, parse(body)))
        answer = await Answer(service, prepared).start()
        if prepared.request.stream:
            return EventStream(answer, _events(answer, ai.pad))
        generation = await answer.result(http.receive)
        return success(await asyncio.to_thread(result, generation, prepared.request))

    async def search(http: HttpRequest) -> Response:
        query = http.query_params
        number, size = (_count(query.get(name), name, default) for name, default in (("page", 1), ("per_page", 50)))
        size = min(size, MOST_PER_PAGE)
        found = [_entry(name, ai) for name in ai.models if _matches(name, dict(query))]
        part = found[(number - 1) * size : number * size]
        info = {"count": len(part), "page": number, "per_page": size, "total_count": len(found)}
        return success(part, result_info=info)

    async def schema(http: HttpRequest) -> Response:
        name = http.query_params.get("model", "")
        if name not in ai.models:
            raise AiError(5007, f"No such model {short(name)} or task")
        return success({"input": page(name).schema, "output": SCHEMA})

    return [
        Route("/run/{model:path}", run, methods=["POST"]),
        Route("/models/search", search, methods=["GET"]),
        Route("/models/schema", schema, methods=["GET"]),
    ]


async def _events(answer: Answer, pad: bool) -> AsyncIterator[bytes]:
    chunks = Chunks(answer.prepared.request)
    async for event in answer:
        for chunk in chunks.feed(event):
            yield sse(chunk, pad=pad)
    yield DONE


def answered_by(name: str, ai: AI) -> str:
    """Describe the model that answers under a hosted name."""
    gemma = ai.models[name]
    what = gemma.name or f"a model of {gemma.config.num_parameters:,} parameters"
    return f"{what}, the small model that ships with refgemma, as a stand-in" if gemma.name == "tiny-it" else what


def _entry(name: str, ai: AI) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid5(_IDS, name)),
        "source": 1,
        "name": name,
        "description": f"Answered on this machine by {answered_by(name, ai)}.",
        "task": {"id": str(uuid.uuid5(_IDS, TASK)), "name": TASK, "description": "Text that continues text."},
        "tags": [],
        "properties": [
            {"property_id": "context_window", "value": str(context_length(name, ai.models[name]))},
            {"property_id": "lora", "value": "true"},
        ],
    }


def _matches(name: str, query: dict[str, str]) -> bool:
    """Match a model by its name, its author, its task, and its source, which is 1 for Cloudflare's own."""
    return (
        query.get("search", "").lower() in name.lower()
        and query.get("author", "").lower() in ("", name.split("/")[1])
        and query.get("task", "").lower() in ("", TASK.lower())
        and query.get("source", "") in ("", "1", "1.0")
    )


def _count(text: str | None, name: str, default: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 7 and int(text) > 0):
        raise AiError(5006, f"{name} is {short(text)!r}: expected a whole number above 0")
    return int(text)
