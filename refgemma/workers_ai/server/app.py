"""The application: all routes, the guard in front of them, and the one place where an error becomes a response."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from refgemma.errors import InputError
from refgemma.gemma import Gemma
from refgemma.lora import Adapter
from refgemma.workers_ai.ai import AI
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.pages import HOSTED
from refgemma.workers_ai.server import chat, native, playground
from refgemma.workers_ai.server.finetunes import Finetunes
from refgemma.workers_ai.server.finetunes import routes as finetune_routes
from refgemma.workers_ai.server.http import API_ERRORS, api_error, refusal, reply
from refgemma.workers_ai.server.limits import GRACE, REQUESTS, ROWS, WAITING
from refgemma.workers_ai.server.openapi import openapi
from refgemma.workers_ai.server.service import Service
from refgemma.workers_ai.server.streaming import ClientGone, after_last

SHIPPED = ("pirate", "json", "letter")  # adapters of the shipped model
WITHOUT_TOKEN = ("/openapi.json", "/favicon.ico", *playground.FILES)  # public files: they reveal nothing


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
    """Make the application; by default the shipped model answers for both hosted ones, with the shipped adapters."""
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

    of_accounts = [*native.routes(service), *finetune_routes(service.finetunes), *chat.routes(service)]
    app = Starlette(
        routes=[
            Mount("/client/v4/accounts/{account}/ai", routes=of_accounts),
            Route("/openapi.json", describe, methods=["GET"]),
            *playground.routes(service),
        ],
        middleware=[Middleware(Guard, token=token, hosts=hosts)],
        exception_handlers={
            AiError: fail,
            HTTPException: _no_route,
            ClientGone: _client_gone,
            ClientDisconnect: _client_gone,
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
    app.state.service.preparation.close()


async def _no_route(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code if error.status_code in API_ERRORS else 404
    return api_error(status, http.scope["path"], headers=dict(error.headers or {}))


async def _client_gone(http: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's status for a closed connection; it is never sent


class Guard:
    """Middleware that decides whether a request may reach the routes.

    Any page in this machine's browser can send requests to a local server, and no preflight protects the bodies that
    it accepts. So a request with the origin of another page is refused and, where the server listens on this machine
    only, so is one for another host name: a page can make its own name resolve to 127.0.0.1.
    """

    def __init__(self, app: ASGIApp, token: str | None = None, hosts: Collection[str] = ()) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._hosts = hosts
        self._open: set[object] = set()  # one for each request without a complete answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refusal, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._open.add(place := object())
        try:
            app = self._refused(scope) or self._app
            await app(scope, receive, after_last(send, lambda: self._open.discard(place)))
        finally:
            self._open.discard(place)

    def _refused(self, scope: Scope) -> ASGIApp | None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if self._hosts and _name(host) not in self._hosts:
            names = ", ".join(sorted(self._hosts))
            return api_error(403, path, f"This server answers to {names}: start it with --host 0.0.0.0 for other names")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return api_error(403, path, "A page of another origin may not use this server")
        if len(self._open) > REQUESTS:
            return refusal(AiError(3040, f"{REQUESTS} requests are open: try again later"), path)
        if self._token is None or path in WITHOUT_TOKEN:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._token)
        return None if right and kind.lower() == "bearer" else api_error(401, path)


def _name(host: str) -> str:
    """Return the host name of a Host header, or an empty text if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
