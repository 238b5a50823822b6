"""What a hub has of a model: its licence, its size, and whether this project can run it, known before it is fetched."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from refgemma.checkpoint.folder import INDEX, SINGLE, parse_index
from refgemma.config import Config, config_from_hf
from refgemma.errors import InputError
from refgemma.hub.client import RemoteFile, client, plain_errors, read

# Where to read a licence that a model card names without a link.
_TERMS = {"gemma": "https://ai.google.dev/gemma/terms", "apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0"}

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")

_TIMEOUT = 30  # seconds for a hub to say what it has


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A model that a hub has and this project can run."""

    name: str  # ``OWNER/NAME``, as the hub writes it
    commit: str  # the newest revision of the main branch
    licence: str  # what the model card says
    terms: str  # where to read it
    gated: bool  # whether the hub wants it accepted first
    config: Config  # what ``config.json`` says
    # what a model folder needs: configuration, tokenizer, weights in safetensors. Nothing pickled
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)


def look_up(name: str) -> Offer:
    """Ask a hub for a model.

    The hub is https://huggingface.co, or what ``HF_ENDPOINT`` says.
    """
    full = name if "/" in name else f"google/{name}"
    if not _NAME.fullmatch(full):
        raise InputError(f"{name!r} is no name of a model: expected OWNER/NAME, such as google/gemma-2b-it")
    if client("constants").HF_HUB_OFFLINE:
        raise ConnectionError(f"HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it to download {full}")
    api = client("hf_api").HfApi(library_name="refgemma")
    with plain_errors(f"{api.endpoint}/{full}"):
        about = api.model_info(full, files_metadata=True, timeout=_TIMEOUT)
    page = f"{api.endpoint}/{about.id}"
    files = _needed_files(about, page)
    try:
        config = config_from_hf(_json_object(read(files[0])))
    except ValueError as error:
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
    """Configuration first, tokenizer, and weights; of two sets of weights the one that `read_folder` would take."""
    there = {sibling.rfilename: sibling for sibling in about.siblings or ()}

    def file(name: str) -> RemoteFile:
        size, large = there[name].size, there[name].lfs
        digest = large.sha256 if large else there[name].blob_id
        # Hashes become names of files here, so they are not taken on trust.
        if not _HASH.fullmatch(str(digest)) or not _HASH.fullmatch(str(about.sha)) or not isinstance(size, int):
            raise InputError(
                f"{page} describes {name} by commit {about.sha!r}, hash {digest!r} and size {size!r}: expected two"
                " hashes and a number of bytes"
            )
        return RemoteFile(page, about.sha, name, size, digest)

    weights = [SINGLE]
    if INDEX in there:
        weights = [INDEX, *sorted(set(parse_index(read(file(INDEX)), f"{about.id}: {INDEX}").values()))]
    wanted = ["config.json", "tokenizer.model", *weights]
    missing = [name for name in wanted if name not in there]
    if missing:
        other = sorted(name for name in there if name.endswith((".gguf", ".bin", ".ckpt", ".pt", ".msgpack")))
        instead = f" (there is {textwrap.shorten(', '.join(other), 100)})" if other else ""
        raise InputError(
            f"{about.id} lacks {', '.join(missing)}{instead}: expected a model in Hugging Face layout with its weights"
            " in safetensors, such as google/gemma-2b-it"
        )
    optional = [name for name in ("generation_config.json",) if name in there]
    return tuple(file(name) for name in (*wanted, *optional))


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"its config.json is not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise InputError(f"its config.json holds a JSON {type(fields).__name__}, expected an object")
    return fields
