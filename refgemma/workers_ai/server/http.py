"""Bodies of requests, read within limits, and the bodies of responses: the REST envelope around a result or an error.

Errors of a model have its own codes; those of the interface, such as a missing token, have the codes of Cloudflare's
API. OpenAI's clients look for an error in the field `error`, so their routes repeat it there.

References
----------
https://developers.cloudflare.com/fundamentals/api/ for the envelope.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from refgemma.errors import InputError
from refgemma.workers_ai.answer import to_json
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.schema import loads
from refgemma.workers_ai.server.limits import BODY_RATE, BODY_SECONDS, DRAIN_BYTES, DRAIN_SECONDS, JSON_BYTES

# As observed of api.cloudflare.com: HTTP status -> code and text.
API_ERRORS = {
    401: (10000, "Authentication error"),
    403: (9109, "Unauthorized to access requested resource"),
    404: (7000, "No route for that URI"),
    405: (7001, "Method not available for that URI."),
}


async def read_chunks(request: HttpRequest, most: int) -> AsyncIterator[bytes]:
    """Yield the body of a request piece by piece, up to a size and a time."""
    announced = request.headers.get("content-length", "")
    too_large = AiError(3006, f"Request is too large: expected a body of at most {most:,} bytes")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > most):
        raise too_large
    stream, total, clock = request.stream(), 0, asyncio.get_running_loop().time
    start = clock()
    while True:
        allowed = BODY_SECONDS + total / BODY_RATE
        try:
            # The remaining time rather than a time per piece: an occasional byte must not extend it.
            chunk = await asyncio.wait_for(anext(stream, None), start + allowed - clock())
        except TimeoutError:
            raise AiError(3007, f"Timeout: the body has not come within {allowed:.0f} seconds") from None
        if chunk is None:
            return
        total += len(chunk)
        if total > most:
            raise too_large
        yield chunk


async def read_body(request: HttpRequest) -> bytes:
    """Read a body that should be JSON, whatever its content type says."""
    return b"".join([chunk async for chunk in read_chunks(request, JSON_BYTES)])


async def read_json(request: HttpRequest) -> Any:
    """Read and parse a body."""
    body = await read_body(request)
    return await request.app.state.service.preparation.run(parse, body)


def parse(body: bytes) -> Any:
    """Parse a body as JSON."""
    if not body.strip():
        raise AiError(3003, "Missing body: expected a JSON object")
    try:
        return loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise AiError(5006, f"the body is not UTF-8 at byte {error.start}: expected JSON") from None
    except InputError as error:
        raise AiError(5006, f"the body cannot be read as JSON: {error}") from None


def reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Make a response with JSON."""
    return Response(to_json(value), status, headers, media_type="application/json")


def success(result: Any, **more: Any) -> Response:
    """Make a response with a result in the envelope."""
    return reply({"result": result, "success": True, "errors": [], "messages": [], **more})


def refusal(cause: AiError, path: str) -> Response:
    """Make a response with an error of a model."""
    headers = {"connection": "close"} if cause.status in (408, 413) else {}  # the rest of the body is not read
    headers |= {"retry-after": "1"} if cause.code == 3040 else {}
    body = cause.envelope() | _for_openai(path, cause.status, cause.code, str(cause))
    kind = _DrainingResponse if cause.status == 413 else Response
    return kind(to_json(body), cause.status, headers, media_type="application/json")


def api_error(status: int, path: str, message: str | None = None, headers: dict[str, str] | None = None) -> Response:
    """Make a response with an error of the interface."""
    code, text = API_ERRORS[status]
    error = {"code": code, "message": message or text}
    body = {"result": None, "success": False, "errors": [error], "messages": []}
    return reply(body | _for_openai(path, status, code, message or text), status, headers)


def openai_error(status: int, code: int, message: str) -> dict[str, Any]:
    """Word an error for OpenAI's clients, which raise `APIError` for it, even within a stream.

    https://platform.openai.com/docs/guides/error-codes
    """
    kind = "invalid_request_error" if status < 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": str(code)}}


def _for_openai(path: str, status: int, code: int, message: str) -> dict[str, Any]:
    return openai_error(status, code, message) if "/ai/v1/" in path else {}


class _DrainingResponse(Response):
    """A response to a body that is still being sent, which is read and dropped for a while.

    If the connection were closed at once, the rest of the body would be answered by a reset, and a client that sends
    everything before it reads would lose the response.
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
