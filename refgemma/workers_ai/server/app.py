"""The application: all routes behind one door, and one place where an error becomes a response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Mount, Route

from refgemma.errors import InputError
from refgemma.gemma import Gemma
from refgemma.lora import Adapter
from refgemma.workers_ai.ai import AI
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.pages import HOSTED
from refgemma.workers_ai.server import catalogue, chat_routes, finetune_routes, page, playground, run
from refgemma.workers_ai.server.finetunes import Finetunes
from refgemma.workers_ai.server.guard import Guard
from refgemma.workers_ai.server.limits import GRACE, ROWS, WAITING
from refgemma.workers_ai.server.openapi import openapi
from refgemma.workers_ai.server.replies import OF_THE_API, api_error, refusal, reply
from refgemma.workers_ai.server.service import Service
from refgemma.workers_ai.server.streaming import ClientGone

SHIPPED = ("pirate", "json", "letter")  # adapters of the shipped model


def create_app(
    models: Mapping[str, Gemma | str | Path] | None = None,
    loras: Mapping[str, Adapter | str | Path] | None = None,
    *,
    pad: bool = False,
    token: str | None = None,
    hosts: Collection[str] = (),
    finetunes: str | Path | None = None,
    max_rows: int = ROWS,
    max_waiting: int = WAITING,
) -> Starlette:
    """Make the server's application."""
    if token == "":
        raise InputError("the token is empty: expected one that is hard to guess, or none at all")
    if loras is None:
        loras = {} if models else {name: name for name in SHIPPED}
    ai = AI(models or dict.fromkeys(HOSTED, "tiny-it"), loras, pad=pad)
    service = Service(
        ai, Finetunes(ai, None if finetunes is None else Path(finetunes)), max_rows=max_rows, max_waiting=max_waiting
    )

    async def fail(http: HttpRequest, error: Exception) -> Response:
        return refusal(service.failure(error), http.scope["path"])

    async def describe(http: HttpRequest) -> Response:
        return reply(openapi(ai))

    of_accounts = [*run.routes(service), *finetune_routes.routes(service.finetunes), *catalogue.routes(ai)]
    of_accounts += chat_routes.routes(service)
    app = Starlette(
        routes=[
            Mount("/client/v4/accounts/{account}/ai", routes=of_accounts),
            Route("/openapi.json", describe, methods=["GET"]),
            *page.routes(),
            *playground.routes(service),
        ],
        middleware=[Middleware(Guard, token=token, hosts=hosts)],
        exception_handlers={
            AiError: _refuse,
            HTTPException: _no_route,
            ClientGone: _nobody,
            ClientDisconnect: _nobody,
            Exception: fail,
        },
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    await asyncio.to_thread(app.state.service.close, GRACE)
    app.state.service.finetunes.close()
    app.state.service.turns.close()


async def _refuse(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, AiError)
    return refusal(error, http.scope["path"])


async def _no_route(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    status = error.status_code if error.status_code in OF_THE_API else 404
    return api_error(status, http.scope["path"], headers=headers)


async def _nobody(http: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's number for a client that is gone; nobody reads it
