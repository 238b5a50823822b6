"""What goes back: the REST envelope around a result, and around an error.

Errors of the models have codes of their own, those of the interface in front of them, such as a missing token, the
codes of Cloudflare's API at large. On OpenAI's routes, whose clients look for them there, each stands once more in
the field `error`.

References
----------
https://developers.cloudflare.com/fundamentals/api/ for the envelope.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from refgemma.workers_ai.answer import to_json
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.server.limits import DRAIN_BYTES, DRAIN_SECONDS

# As observed of api.cloudflare.com: HTTP status -> code and text.
OF_THE_API = {
    401: (10000, "Authentication error"),
    403: (9109, "Unauthorized to access requested resource"),
    404: (7000, "No route for that URI"),
    405: (7001, "Method not available for that URI."),
}


def reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Response with JSON."""
    return Response(to_json(value), status, headers, media_type="application/json")


def success(result: Any, **more: Any) -> Response:
    """Response with a result."""
    return reply({"result": result, "success": True, "errors": [], "messages": [], **more})


def refusal(cause: AiError, path: str) -> Response:
    """Response with an error of a model."""
    headers = {"connection": "close"} if cause.status in (408, 413) else {}  # the rest of the body is not read
    headers |= {"retry-after": "1"} if cause.code == 3040 else {}
    body = cause.envelope() | _beside(path, cause.status, cause.code, str(cause))
    kind = _Lingering if cause.status == 413 else Response
    return kind(to_json(body), cause.status, headers, media_type="application/json")


def api_error(status: int, path: str, message: str | None = None, headers: dict[str, str] | None = None) -> Response:
    """Response with an error of the interface."""
    code, text = OF_THE_API[status]
    error = {"code": code, "message": message or text}
    beside = _beside(path, status, code, message or text)
    return reply({"result": None, "success": False, "errors": [error], "messages": []} | beside, status, headers)


def openai_error(status: int, code: int, message: str) -> dict[str, Any]:
    """An error where OpenAI's clients look for it: their `APIError` is raised for it, in a stream, too.

    https://platform.openai.com/docs/guides/error-codes
    """
    kind = "invalid_request_error" if status < 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": str(code)}}


def _beside(path: str, status: int, code: int, message: str) -> dict[str, Any]:
    return openai_error(status, code, message) if "/ai/v1/" in path else {}


class _Lingering(Response):
    """A response to a body that is still coming: whoever sends all of it before reading gets to read this, too.

    Were the connection closed at once, what is on its way would be answered by a reset, which drops the response.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        dropped, more = 0, True
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while more and dropped < DRAIN_BYTES:
                    message = await receive()
                    more = message.get("more_body", False)
                    dropped += len(message.get("body", b""))
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
