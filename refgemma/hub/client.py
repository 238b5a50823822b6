"""The bytes of files on a Hugging Face hub, through huggingface_hub: the only place that opens a connection.

That library (extra ``hub``) knows the way, endpoint, token, proxies and retries, and is imported only when a function
here is called. What a hub refuses, and what goes wrong on the way, becomes one sentence that says what to do.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple
from urllib.parse import quote

from refgemma.errors import InputError


class RemoteFile(NamedTuple):
    """A file on a hub; `digest` is the SHA-256 of a large file, and for a small one the SHA-1 that git calls it by."""

    page: str
    commit: str
    name: str
    size: int
    digest: str


def client(module: str) -> Any:
    """Import a part of huggingface_hub, which is optional, large, and different from version to version."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError('downloading takes huggingface_hub, which is not installed: pip install "refgemma[hub]"')
    return importlib.import_module(f"huggingface_hub.{module}")


def transfer(file: RemoteFile, out: IO[bytes]) -> None:
    """Fetch what is still missing of a file.

    Not ``hf_hub_download``, which begins anew after an interruption
    (https://github.com/huggingface/huggingface_hub/issues/4196), but the function below it, which need not.
    """
    http_get = client("file_download").http_get
    headers = client("utils").build_hf_headers(library_name="refgemma")
    headers["Accept-Encoding"] = "identity"  # offsets and sizes are those of the file, not of a compressed one
    url = f"{file.page}/resolve/{file.commit}/{quote(file.name)}"
    with plain_errors(file.page), _no_second_progress_bar():
        http_get(url, out, resume_size=out.tell(), headers=headers, expected_size=file.size)


def read(file: RemoteFile) -> bytes:
    """Fetch a small file."""
    buffer = io.BytesIO()
    transfer(file, buffer)
    return buffer.getvalue()


@contextmanager
def plain_errors(page: str) -> Iterator[None]:
    """Say in one sentence what goes wrong between here and the page of a model."""
    endpoint, owner, name = page.rsplit("/", 2)
    errors = client("errors")
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(
            f"{owner}/{name} is gated: accept its licence at {page}, then log in to that account with `hf auth login`"
            " or set HF_TOKEN to a token of it"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{endpoint} has no model {owner}/{name}, or it is private: check the name, or log in with `hf auth login`"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise PermissionError(
                f"{endpoint} refuses the token: log in with `hf auth login`, or set HF_TOKEN to a valid one"
            ) from None
        raise ConnectionError(
            f"{endpoint} answered {status} for {owner}/{name}{_detail(error.server_message)}: try again later"
        ) from None
    except errors.HFValidationError as error:
        raise InputError(f"{owner}/{name} is no name of a model{_detail(error)}: expected OWNER/NAME") from None
    except Exception as error:
        # What the HTTP library raises, which differs from version to version. A full disk is the only other thing.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ConnectionError(
            f"the connection to {endpoint} failed{_detail(error)}: check the network and run it again"
        ) from error


def _detail(message: object) -> str:
    """In parentheses, and short: some messages are pages."""
    text = textwrap.shorten(str(message or ""), 160)
    return f" ({text})" if text else ""


@contextmanager
def _no_second_progress_bar() -> Iterator[None]:
    """Let huggingface_hub draw no bar of its own, unless HF_HUB_DISABLE_PROGRESS_BARS says that it shall."""
    bars, utils = "huggingface_hub.http_get", client("utils")
    if client("constants").HF_HUB_DISABLE_PROGRESS_BARS is not None or utils.are_progress_bars_disabled(bars):
        yield
        return
    utils.disable_progress_bars(bars)
    try:
        yield
    finally:
        utils.enable_progress_bars(bars)
