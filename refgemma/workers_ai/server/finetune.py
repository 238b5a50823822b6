"""What is told of a finetune, and what its maker may say of it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from refgemma.errors import InputError
from refgemma.lora import Adapter, fit
from refgemma.workers_ai.ai import AI
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.schema import short
from refgemma.workers_ai.server.limits import DESCRIPTION, NAME

RESERVED = "cf-public-"  # Cloudflare's own adapters
NAME_PATTERN = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME - 1}}}"
_GIVEN = uuid.UUID("5c2c2f6e-9e52-4a83-9a5c-5d8f0f0d6a01")  # of ids for adapters that the server was started with


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """What is told of a finetune."""

    id: str  # a UUID
    created_at: str  # ISO 8601, UTC
    model: str  # hosted model that it is for
    modified_at: str  # ISO 8601, UTC
    name: str  # what its maker called it
    public: bool = False  # whether it is in the public list
    description: str = ""  # what its maker said of it


def uploaded(fields: Any) -> Finetune:
    """Finetune that a request describes."""
    now = _now()
    return Finetune(id=str(uuid.uuid4()), created_at=now, modified_at=now, **_checked(fields))


def given(name: str, ai: AI) -> Finetune:
    """Finetune for an adapter that the server was started with."""
    adapter = ai.loras[name]
    model = next((model for model in ai.models if fits(adapter, model, ai)), None)
    if model is None:
        raise InputError(f"adapter {name!r} ({adapter.folder}) fits none of the models: {', '.join(ai.models)}")
    time = _now()
    about = f"given when the server was started: {adapter.name}"
    return Finetune(
        id=str(uuid.uuid5(_GIVEN, name)),
        created_at=time,
        modified_at=time,
        model=model,
        name=name,
        public=True,
        description=about,
    )


def fits(adapter: Adapter, model: str, ai: AI) -> bool:
    """Whether an adapter fits a model."""
    try:
        fit(adapter, ai.models[model].config)
    except ValueError:
        return False
    return True


def check_stored(finetune: Finetune, folder: str) -> None:
    """Refuse a stored finetune that was not made here."""
    if not all(isinstance(value, bool if name == "public" else str) for name, value in asdict(finetune).items()):
        raise InputError("it holds a value of the wrong kind")
    if finetune.id != folder or not re.fullmatch(NAME_PATTERN, finetune.name):
        raise InputError("its id is not the name of its folder, or its name is none that a finetune can have")


def _checked(fields: Any) -> Mapping[str, Any]:
    """Fields of a new finetune, or a sentence on what is wrong."""
    if not isinstance(fields, dict):
        raise AiError(5006, "the body is no object: expected model, name and perhaps description and public")
    name, description, public = fields.get("name"), fields.get("description") or "", fields.get("public") or False
    if not isinstance(fields.get("model"), str):
        raise AiError(5006, "required properties at '/' are 'model,name'")
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        wanted = f"1 to {NAME} letters, digits, dots, hyphens and underscores, the first a letter or digit"
        raise AiError(5006, f"'/name' is {short(str(name))!r}: expected {wanted}")
    if name.lower().startswith(RESERVED):
        raise AiError(5006, f"'/name' begins with {RESERVED}, which is reserved: expected another name")
    if not isinstance(description, str) or len(description) > DESCRIPTION:
        raise AiError(5006, f"'/description' must be a text of at most {DESCRIPTION} characters")
    if not isinstance(public, bool):
        raise AiError(5006, "'/public' must be true or false")
    description = description.encode("utf-8", "replace").decode()  # half a surrogate pair has no place in a file
    return {"model": fields["model"], "name": name, "description": description, "public": public}


def _now() -> str:
    return datetime.now(UTC).isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00")
