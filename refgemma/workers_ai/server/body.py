"""Bodies of requests: read up to a limit, whatever was announced, and taken for JSON, whatever their type says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, NoReturn

from starlette.requests import Request as HttpRequest

from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.server.limits import BODY_SECONDS, JSON_BYTES


async def chunks(request: HttpRequest, most: int) -> AsyncIterator[bytes]:
    """Body of a request, piece by piece.

    Parameters
    ----------
    request : HttpRequest
        Whose body was not read yet.
    most : int
        Bytes.

    Yields
    ------
    bytes
        The next piece.

    Raises
    ------
    AiError
        3006 where there are more bytes, 3007 where none come any more.
    """
    announced = request.headers.get("content-length", "")
    too_large = AiError(3006, f"Request is too large: expected a body of at most {most:,} bytes")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > most):
        raise too_large
    stream, total = request.stream(), 0
    while True:
        try:
            chunk = await asyncio.wait_for(anext(stream, None), BODY_SECONDS)
        except TimeoutError:
            raise AiError(3007, f"Timeout: no more of the body has come for {BODY_SECONDS:g} seconds") from None
        if chunk is None:
            return
        total += len(chunk)
        if total > most:
            raise too_large
        yield chunk


async def read_json(request: HttpRequest) -> Any:
    """JSON of a request.

    Parameters
    ----------
    request : HttpRequest
        Of any content type: the pages' own curl examples send none, so curl says it is a form.

    Returns
    -------
    object
        As `json.loads` makes it.

    Raises
    ------
    AiError
        3003 where there is no body, 3006 where it is too large, 5006 where it is not JSON.
    """
    body = b"".join([chunk async for chunk in chunks(request, JSON_BYTES)])
    return await asyncio.to_thread(parse, body)


def parse(body: bytes) -> Any:
    """Take bytes for JSON.

    Parameters
    ----------
    body : bytes
        In UTF-8.

    Returns
    -------
    object
        As `json.loads` makes it; of a key that stands twice the last value counts, as in JavaScript.

    Raises
    ------
    AiError
        3003 where there is nothing, 5006 where it is not JSON: NaN and Infinity are none, either.
    """
    if not body.strip():
        raise AiError(3003, "Missing body: expected a JSON object")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise AiError(5006, f"the body is not UTF-8 at byte {error.start}: expected JSON") from None
    except RecursionError:
        raise AiError(5006, "the body is nested too deep: expected JSON of fewer levels") from None
    except ValueError as error:
        raise AiError(5006, f"the body is not valid JSON: {str(error)[:200]}") from None


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")
