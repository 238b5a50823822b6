"""The page of the playground: a handful of plain files, and the headers that confine it to this server.

Nothing is built, and nothing comes from anywhere else. The look of tokens and decisions is that of a record's page.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

_SCRIPTS = ("server.js", "settings.js", "code.js", "request.js", "conversation.js", "walk.js", "page.js")
# Path -> package, file, type.
FILES = {
    "/": (__package__, "index.html", "text/html"),
    "/playground/page.css": (__package__, "page.css", "text/css"),
    "/playground/icon.svg": (__package__, "icon.svg", "image/svg+xml"),
    **{f"/playground/{name}": (__package__, name, "text/javascript") for name in _SCRIPTS},
    "/playground/decision.css": ("refgemma.sampling.show", "decision.css", "text/css"),
    "/playground/decision.js": ("refgemma.sampling.show", "decision.js", "text/javascript"),
}
# Scripts of this server alone, none of them inline, and no way from a text to markup.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def routes() -> list[Route]:
    """Routes of the page."""
    return [Route(path, _file(*where), methods=["GET"]) for path, where in FILES.items()]


def _file(package: str, name: str, kind: str) -> Callable[[HttpRequest], Awaitable[Response]]:
    content = resources.files(package).joinpath(name).read_bytes()

    async def send(http: HttpRequest) -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return send
