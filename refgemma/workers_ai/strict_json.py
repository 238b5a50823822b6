"""JSON as its standard has it, which is less than Python's reader takes, and errors in its own terms, not in Python's.

References
----------
https://www.rfc-editor.org/rfc/rfc8259
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from refgemma.errors import InputError


def read(text: str) -> Any:
    """Take text for JSON."""
    if text.startswith("\N{BYTE ORDER MARK}"):
        raise InputError("it begins with a byte order mark")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise InputError("it is nested too deep") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except _NoConstant as error:
        raise InputError(f"{error} is no JSON") from None
    except ValueError:  # the one that is left: the interpreter's bound on whole numbers
        raise InputError("it has a whole number with too many digits") from None


class _NoConstant(ValueError):
    """A word that only Python's reader takes."""


def _no_constant(word: str) -> NoReturn:
    raise _NoConstant(word)
