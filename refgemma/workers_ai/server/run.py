"""``POST …/ai/run/{model}``: a request of a model's page, its answer in the REST envelope or as the page's stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from refgemma.workers_ai.answer import DONE, Chunks, result, sse
from refgemma.workers_ai.server.body import parse, read_body
from refgemma.workers_ai.server.replies import success
from refgemma.workers_ai.server.service import Service
from refgemma.workers_ai.server.streaming import Answer, EventStream, while_connected


def routes(service: Service) -> list[Route]:
    """Routes of the native interface."""

    async def run(http: HttpRequest) -> Response | ASGIApp:
        body, model = await read_body(http), http.path_params["model"]
        prepared = await service.turns.run(lambda: service.prepare(model, parse(body)))
        answer = await Answer(service, prepared).start()
        if prepared.request.stream:
            return EventStream(answer, _events(answer, service.ai.pad))
        try:
            generation = await while_connected(http.receive, answer.result())
        finally:
            answer.cancel()
        return success(await asyncio.to_thread(result, generation, prepared.request))

    return [Route("/run/{model:path}", run, methods=["POST"])]


async def _events(answer: Answer, pad: bool) -> AsyncIterator[bytes]:
    chunks = Chunks(answer.prepared.request)
    async for event in answer:
        for chunk in chunks.feed(event):
            yield sse(chunk, pad=pad)
    yield DONE
