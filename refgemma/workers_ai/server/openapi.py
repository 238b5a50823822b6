"""``GET /openapi.json``: the interface described for programs, with the request schemas of the pages.

Each model has its own path, because a path parameter of OpenAPI cannot contain the slashes of its name.

References
----------
https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

from typing import Any

from refgemma.version import __version__
from refgemma.workers_ai.ai import AI
from refgemma.workers_ai.answer import SCHEMA
from refgemma.workers_ai.pages import page
from refgemma.workers_ai.server.adapter_check import FILES
from refgemma.workers_ai.server.finetunes import NAME_PATTERN
from refgemma.workers_ai.server.limits import DESCRIPTION

_TEXT = {"type": "string"}
_FLAG = {"type": "boolean"}


def _object(required: str, **properties: Any) -> dict[str, Any]:
    """Make the schema of an object; `required` names properties, separated by spaces."""
    return {"type": "object", "properties": properties, "required": required.split()}


_BASE = "/client/v4/accounts/{account_id}/ai"
_ACCOUNT = {"name": "account_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_ERROR = _object(
    "errors success",
    errors={"type": "array", "items": _object("message", code={"type": "integer"}, message=_TEXT)},
    success={"const": False},
    result={},
    messages={"type": "array"},
)
_FINETUNE = _object(
    "id created_at model modified_at name",
    **dict.fromkeys(("id", "created_at", "model", "modified_at", "name", "description"), _TEXT),
    public=_FLAG,
)
_NEW_FINETUNE = _object(
    "model name",
    model=_TEXT,
    name={"type": "string", "pattern": f"^{NAME_PATTERN}$"},
    description={"type": "string", "maxLength": DESCRIPTION},
    public=_FLAG,
)
_ASSET = _object("file_name file", file_name={"enum": list(FILES)}, file={"type": "string", "format": "binary"})
_MESSAGE = _object("role content", role={"enum": ["system", "user", "assistant", "tool"]}, content=_TEXT)
_CHAT = _object(
    "model messages",
    model=_TEXT,
    messages={"type": "array", "minItems": 1, "items": _MESSAGE},
    stream=_FLAG,
    max_tokens={"type": "integer", "minimum": 1},
    temperature={"type": "number", "minimum": 0, "maximum": 5},
    top_p={"type": "number", "minimum": 0, "maximum": 1},
    seed={"type": "integer", "minimum": 1, "maximum": 9999999999},
    stop={"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4},
    tools={"type": "array", "items": {"type": "object"}},
)


def openapi(ai: AI) -> dict[str, Any]:
    """Describe the interface."""
    model: dict[str, Any] = {"name": "model", "in": "query", "required": True, "schema": {"enum": list(ai.models)}}
    finetune = {"name": "finetune", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    number = {"type": "integer", "minimum": 1, "maximum": 999_999}
    search: list[dict[str, Any]] = [
        *({"name": name, "in": "query", "schema": {"type": "string"}} for name in ("search", "author", "task")),
        *({"name": name, "in": "query", "schema": number} for name in ("page", "per_page")),
    ]
    create = _post("Make a finetune", _NEW_FINETUNE, {"application/json": _envelope(_FINETUNE)})
    finetunes = _get("List finetunes", _envelope({"type": "array", "items": _FINETUNE}))
    uploaded = {"application/json": _object("success", success={"const": True})}
    upload = _post("Upload a file of a finetune", _ASSET, uploaded, "multipart/form-data")
    paths = {f"{_BASE}/run/{name}": {"parameters": [_ACCOUNT], "post": _run(name)} for name in ai.models}
    paths |= {
        f"{_BASE}/v1/chat/completions": {
            "parameters": [_ACCOUNT],
            "post": _post("Chat, in OpenAI's format", _CHAT, _either({"type": "object"})),
        },
        f"{_BASE}/finetunes": {"parameters": [_ACCOUNT], "post": create, "get": finetunes},
        f"{_BASE}/finetunes/public": {"parameters": [_ACCOUNT], "get": finetunes},
        f"{_BASE}/finetunes/{{finetune}}/finetune-assets": {"parameters": [_ACCOUNT, finetune], "post": upload},
        f"{_BASE}/models/search": {
            "parameters": [_ACCOUNT, *search],
            "get": _get("Find models", _envelope({"type": "array", "items": {"type": "object"}})),
        },
        f"{_BASE}/models/schema": {
            "parameters": [_ACCOUNT, model],
            "get": _get("Schema of a model", _envelope({"type": "object"})),
        },
    }
    title = "refgemma: the Gemma models of Workers AI, answered locally"
    return {"openapi": "3.1.0", "info": {"title": title, "version": __version__}, "paths": paths}


def _run(name: str) -> dict[str, Any]:
    return _post(f"Run {name}", page(name).schema, _either(_envelope(SCHEMA)))


def _either(schema: dict[str, Any]) -> dict[str, Any]:
    """Describe an answer that is whole or a stream."""
    return {"application/json": schema, "text/event-stream": {}}


def _envelope(result: dict[str, Any]) -> dict[str, Any]:
    return _object(
        "result success errors messages",
        result=result,
        success={"const": True},
        errors={"type": "array", "maxItems": 0},
        messages={"type": "array"},
    )


def _get(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"summary": summary, "responses": _responses({"application/json": schema})}


def _post(
    summary: str, body: dict[str, Any], answers: dict[str, Any], kind: str = "application/json"
) -> dict[str, Any]:
    request = {"required": True, "content": {kind: {"schema": body}}}
    return {"summary": summary, "requestBody": request, "responses": _responses(answers)}


def _responses(answers: dict[str, Any]) -> dict[str, Any]:
    """Describe success, and the statuses of `refgemma.workers_ai.errors.CODES` and of the interface."""
    fine = {"description": "success", "content": {kind: {"schema": schema} for kind, schema in answers.items()}}
    error = {"description": "an error", "content": {"application/json": {"schema": _ERROR}}}
    return {"200": fine} | dict.fromkeys(("400", "401", "403", "404", "405", "408", "413", "429", "500"), error)
