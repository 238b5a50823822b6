"""Bodies of requests: read up to a limit, whatever was announced, and taken for JSON, whatever their type says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest

from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.schema import loads
from refgemma.workers_ai.server.limits import BODY_RATE, BODY_SECONDS, JSON_BYTES


async def chunks(request: HttpRequest, most: int) -> AsyncIterator[bytes]:
    """Body of a request, piece by piece."""
    announced = request.headers.get("content-length", "")
    too_large = AiError(3006, f"Request is too large: expected a body of at most {most:,} bytes")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > most):
        raise too_large
    stream, total, clock = request.stream(), 0, asyncio.get_running_loop().time
    start = clock()
    while True:
        allowed = BODY_SECONDS + total / BODY_RATE
        try:
            # The time that is left, and not a time for each piece: a byte now and then buys no more of it.
            chunk = await asyncio.wait_for(anext(stream, None), start + allowed - clock())
        except TimeoutError:
            raise AiError(3007, f"Timeout: the body has not come within {allowed:.0f} seconds") from None
        if chunk is None:
            return
        total += len(chunk)
        if total > most:
            raise too_large
        yield chunk


async def read_json(request: HttpRequest) -> Any:
    """JSON of a request."""
    body = await read_body(request)
    return await request.app.state.service.turns.run(parse, body)


async def read_body(request: HttpRequest) -> bytes:
    """Body of a request that is to be JSON."""
    return b"".join([chunk async for chunk in chunks(request, JSON_BYTES)])


def parse(body: bytes) -> Any:
    """Take bytes for JSON."""
    if not body.strip():
        raise AiError(3003, "Missing body: expected a JSON object")
    try:
        return loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise AiError(5006, f"the body is not UTF-8 at byte {error.start}: expected JSON") from None
    except ValueError as error:
        raise AiError(5006, f"the body cannot be read as JSON: {error}") from None
