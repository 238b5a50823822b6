"""The service's error codes as data, and the exception that carries one.

REST returns an error in an envelope. A binding raises an exception with the code, a colon and the text as its message.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Code(NamedTuple):
    """A row of the table: HTTP status, meaning, and how both are known."""

    status: int
    meaning: str
    source: str = "documented"


# Documented at https://developers.cloudflare.com/workers-ai/platform/errors/, observed by users, or assumed.
CODES: dict[int, Code] = {
    3003: Code(400, "headers or body are missing"),
    3006: Code(413, "the request is too large"),
    3007: Code(408, "time is up"),
    3008: Code(408, "the request was aborted"),
    3023: Code(403, "the account is blocked"),
    3036: Code(429, "the daily allocation is used up"),
    3037: Code(404, "no such finetune", "code and text observed, status assumed"),
    3039: Code(400, "a finetune lacks a file"),
    3040: Code(429, "out of capacity"),
    3041: Code(403, "the account may not use this model"),
    3042: Code(404, "the model's name is invalid"),
    3043: Code(500, "internal error", "observed"),
    5004: Code(400, "invalid data type for base64 input"),
    5005: Code(405, "the model does not support LoRA"),
    5006: Code(400, "the input is invalid", "observed"),
    5007: Code(400, "no such model or task"),
    5016: Code(403, "the model's terms were not accepted"),
    5018: Code(403, "the account may not use this model"),
    5019: Code(405, "the SDK is too old"),
    5024: Code(400, "the answer is not the JSON that was asked for", "code and text observed, status assumed"),
}


class AiError(Exception):
    """An error that a request gets instead of an answer.

    Parameters
    ----------
    code : int
        A key of `CODES`.
    message : str
        One sentence; line breaks in quotations are escaped.

    Attributes
    ----------
    code : int
        The service's code.
    status : int
        Of the HTTP response.
    message : str
        The sentence.
    description : str
        The sentence as a binding has it; ``str(error)`` is the code, a colon and this.
    """

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        self.status = CODES[code].status
        self.message = message.replace("\r", "\\r").replace("\n", "\\n")
        self.description = f"Error: {self.message}" if code == 5006 else self.message
        super().__init__(f"{code}: {self.description}")

    def __reduce__(self) -> tuple[type[AiError], tuple[int, str]]:
        return type(self), (self.code, self.message)

    def envelope(self) -> dict[str, Any]:
        """Return the body of the REST response.

        Returns
        -------
        dict
            With its keys in the observed order: ``errors``, ``success``, ``result``, ``messages``.

        References
        ----------
        https://github.com/cloudflare/cloudflare-docs/issues/14757 for 3037, https://github.com/cloudflare/ai/issues/279
        for 5006.
        """
        kind = "Bad input" if self.code == 5006 else "AiError"
        message = f"AiError: {kind}: {self.description}"
        return {"errors": [{"message": message, "code": self.code}], "success": False, "result": {}, "messages": []}
