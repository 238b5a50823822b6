"""What a hub has of a model, known before it is fetched: licence, size, and whether refgemma can run it.

The only module that opens a connection. huggingface_hub (extra ``hub``) knows endpoint, token, proxies and retries; it
is imported on first use. Each of its errors becomes one sentence that says what to do.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NamedTuple
from urllib.parse import quote

from refgemma.checkpoint.folder import INDEX, SINGLE, parse_index
from refgemma.config import Config, config_from_hf
from refgemma.errors import InputError

# Licences that model cards name without a link.
_TERMS = {"gemma": "https://ai.google.dev/gemma/terms", "apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0"}
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_TIMEOUT = 30  # seconds


class RemoteFile(NamedTuple):
    """A file on a hub."""

    page: str
    commit: str
    name: str
    size: int
    digest: str  # SHA-256 of a large file, git's SHA-1 of a small one


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A model that a hub has and refgemma can run."""

    name: str  # ``OWNER/NAME``, as the hub writes it
    commit: str  # the newest of the main branch
    licence: str  # according to the model card
    terms: str  # where to read it
    gated: bool  # whether the hub wants it accepted first
    config: Config
    files: tuple[RemoteFile, ...]  # configuration, tokenizer, weights in safetensors; nothing pickled

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)


def look_up(name: str) -> Offer:
    """Ask https://huggingface.co, or the hub that ``HF_ENDPOINT`` names, for a model."""
    full = name if "/" in name else f"google/{name}"
    if not _NAME.fullmatch(full):
        raise InputError(f"{name!r} is not the name of a model: expected OWNER/NAME, such as google/gemma-2b-it")
    if client("constants").HF_HUB_OFFLINE:
        raise ConnectionError(f"HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it to download {full}")
    api = client("hf_api").HfApi(library_name="refgemma")
    with _plain_errors(f"{api.endpoint}/{full}"):
        about = api.model_info(full, files_metadata=True, timeout=_TIMEOUT)
    page = f"{api.endpoint}/{about.id}"
    files = _needed_files(about, page)
    try:
        config = config_from_hf(_json_object(_read(files[0])))
    except InputError as error:
        raise InputError(f"{about.id} is not supported: {error}") from None
    card = about.card_data or {}
    licence = str(card.get("license_name") or card.get("license") or "not stated")
    link = str(card.get("license_link") or _TERMS.get(licence) or "")
    return Offer(
        name=about.id,
        commit=about.sha,
        licence=licence,
        terms=link if link.startswith("https://") else page,
        gated=bool(about.gated),
        config=config,
        files=files,
    )


def _needed_files(about: Any, page: str) -> tuple[RemoteFile, ...]:
    """Configuration first, tokenizer, and weights: where there are two sets, the one that `read_folder` would take."""
    there = {sibling.rfilename: sibling for sibling in about.siblings or ()}

    def file(name: str) -> RemoteFile:
        size, large = there[name].size, there[name].lfs
        digest = large.sha256 if large else there[name].blob_id
        # Hashes become file names, so they are checked.
        if not _HASH.fullmatch(str(digest)) or not _HASH.fullmatch(str(about.sha)) or not isinstance(size, int):
            raise InputError(
                f"{page} describes {name} by commit {about.sha!r}, hash {digest!r} and size {size!r}: expected two"
                " hashes and a number of bytes"
            )
        return RemoteFile(page, about.sha, name, size, digest)

    weights = [SINGLE]
    if INDEX in there:
        weights = [INDEX, *sorted(set(parse_index(_read(file(INDEX)), f"{about.id}: {INDEX}").values()))]
    wanted = ["config.json", "tokenizer.model", *weights]
    missing = [name for name in wanted if name not in there]
    if missing:
        other = sorted(name for name in there if name.endswith((".gguf", ".bin", ".ckpt", ".pt", ".msgpack")))
        instead = f" (there is {textwrap.shorten(', '.join(other), 100)})" if other else ""
        raise InputError(
            f"{about.id} lacks {', '.join(missing)}{instead}: expected a model in Hugging Face layout with its weights"
            " in safetensors, such as google/gemma-2b-it"
        )
    return tuple(file(name) for name in (*wanted, "generation_config.json") if name in there)


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"its config.json is not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise InputError(f"its config.json holds a JSON {type(fields).__name__}, expected an object")
    return fields


def client(module: str) -> Any:
    """Import a module of huggingface_hub, which is optional and large."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError('downloading takes huggingface_hub, which is not installed: pip install "refgemma[hub]"')
    return importlib.import_module(f"huggingface_hub.{module}")


def transfer(file: RemoteFile, out: IO[bytes]) -> None:
    """Append to `out` what it lacks of a file."""
    headers = client("utils").build_hf_headers(library_name="refgemma")
    headers["Accept-Encoding"] = "identity"  # offsets and sizes are those of the file, not of a compressed one
    url = f"{file.page}/resolve/{file.commit}/{quote(file.name)}"
    with _plain_errors(file.page), _without_its_progress_bar():
        client("file_download").http_get(url, out, resume_size=out.tell(), headers=headers, expected_size=file.size)


def _read(file: RemoteFile) -> bytes:
    buffer = io.BytesIO()
    transfer(file, buffer)
    return buffer.getvalue()


@contextmanager
def _plain_errors(page: str) -> Iterator[None]:
    """Turn whatever fails between here and the page of a model into one sentence."""
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
        raise InputError(f"{owner}/{name} is not the name of a model{_detail(error)}: expected OWNER/NAME") from None
    except Exception as error:
        # Errors of the HTTP library, which differ between versions. Only a full disk is something else.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ConnectionError(
            f"the connection to {endpoint} failed{_detail(error)}: check the network and run it again"
        ) from error


def _detail(message: object) -> str:
    """In parentheses, and shortened: some messages are pages."""
    text = textwrap.shorten(str(message or ""), 160)
    return f" ({text})" if text else ""


@contextmanager
def _without_its_progress_bar() -> Iterator[None]:
    """Keep huggingface_hub from drawing a second bar, unless HF_HUB_DISABLE_PROGRESS_BARS decides."""
    bars, utils = "huggingface_hub.http_get", client("utils")
    if client("constants").HF_HUB_DISABLE_PROGRESS_BARS is not None or utils.are_progress_bars_disabled(bars):
        yield
        return
    utils.disable_progress_bars(bars)
    try:
        yield
    finally:
        utils.enable_progress_bars(bars)
