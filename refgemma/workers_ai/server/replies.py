"""What goes back: the REST envelope around a result, and around an error.

Errors of the models have codes of their own, those of the interface in front of them, such as a missing token, the
codes of Cloudflare's API at large.

References
----------
https://developers.cloudflare.com/fundamentals/api/ for the envelope.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from refgemma.workers_ai.answer import to_json
from refgemma.workers_ai.errors import AiError

# As observed of api.cloudflare.com: HTTP status -> code and text.
OF_THE_API = {
    401: (10000, "Authentication error"),
    403: (9109, "Unauthorized to access requested resource"),
    404: (7000, "No route for that URI"),
    405: (7001, "Method not available for that URI."),
}


def reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Response with JSON.

    Parameters
    ----------
    value : object
        What `json.dumps` takes.
    status : int
        Of HTTP.
    headers : dict, optional
        More of them.

    Returns
    -------
    Response
        Compact, in UTF-8.
    """
    return Response(to_json(value), status, headers, media_type="application/json")


def success(result: Any, **more: Any) -> Response:
    """Response with a result.

    Parameters
    ----------
    result : object
        What was asked for.
    **more
        Fields after those of the envelope.

    Returns
    -------
    Response
        In the order of the documentation's example.
    """
    return reply({"result": result, "success": True, "errors": [], "messages": [], **more})


def refusal(cause: AiError, **more: Any) -> Response:
    """Response with an error of a model.

    Parameters
    ----------
    cause : AiError
        The error.
    **more
        Fields after those of the envelope.

    Returns
    -------
    Response
        With the status that its code has.
    """
    headers = {"connection": "close"} if cause.status in (408, 413) else {}  # the rest of the body is not read
    headers |= {"retry-after": "1"} if cause.code == 3040 else {}
    return reply(cause.envelope() | more, cause.status, headers)


def api_error(status: int, message: str | None = None, headers: dict[str, str] | None = None) -> Response:
    """Response with an error of the interface.

    Parameters
    ----------
    status : int
        Of HTTP; a key of `OF_THE_API`.
    message : str, optional
        Another text.
    headers : dict, optional
        More of them.

    Returns
    -------
    Response
        In the envelope.
    """
    code, text = OF_THE_API[status]
    error = {"code": code, "message": message or text}
    return reply({"result": None, "success": False, "errors": [error], "messages": []}, status, headers)
