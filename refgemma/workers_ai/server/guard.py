"""Who may ask: the door in front of all routes.

A server on this machine can be reached by every page in this machine's browser, and the bodies it takes need no
preflight. So a request that a page of another origin sent is refused, and where the server listens to this machine
alone, so is one for a host name that is not this machine's (a page can point a name of its own at 127.0.0.1).
"""

from __future__ import annotations

import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.server import page
from refgemma.workers_ai.server.limits import REQUESTS
from refgemma.workers_ai.server.replies import api_error, refusal
from refgemma.workers_ai.server.streaming import after_last

OPEN = ("/openapi.json", "/favicon.ico", *page.FILES)  # without a token: they tell nothing but what this is


class Guard:
    """Middleware that lets requests through, or answers them itself."""

    def __init__(self, app: ASGIApp, token: str | None = None, hosts: Collection[str] = ()) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._hosts = hosts
        self._open: set[object] = set()  # one for each request without a complete answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request."""
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
            return refusal(AiError(3040, f"{REQUESTS} requests are open: come again later"), path)
        if self._token is None or path in OPEN:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._token)
        return None if right and kind.lower() == "bearer" else api_error(401, path)


def _name(host: str) -> str:
    """Host name of a Host header; empty where it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
