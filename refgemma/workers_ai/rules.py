"""What this server demands of a request beyond the page's schema, one function a rule.

Each is a choice where the pages are silent or allow what has no meaning; the table "What we assume" in the README lists
them. A rule gets inputs that the schema has accepted, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.json_mode import check_format
from refgemma.workers_ai.pages import Page
from refgemma.workers_ai.schema import type_name

MOST_TOOLS = 128  # the limit of OpenAI's API; no prompt holds that many. Functions are counted by it, too
MOST_VALUES = 50_000  # inside the tools, and in a schema for answers: some times what a context has tokens
DEEPEST = 64  # levels of lists and objects; writing deeper ones out would meet the limits of the interpreter


def check_depth(inputs: Any) -> None:
    """Refuse inputs that are nested too deep; to be called before the schema."""
    for depth, _ in enumerate(_levels(inputs)):
        if depth == DEEPEST:
            raise AiError(5006, f"lists and objects are nested more than {DEEPEST} deep")


def _levels(value: Any) -> Iterator[list[Any]]:
    """Lists and objects that have something in them, level by level: of empty ones there may be a million."""
    level = [value] if value and isinstance(value, dict | list) else []
    while level:
        yield level
        children = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for inner in children for value in inner if value and isinstance(value, dict | list)]


def with_raw_read(inputs: Any) -> Any:
    """Take ``"raw": "true"`` for true, as the curl example of both pages sends it; to be called before the schema."""
    return inputs | {"raw": True} if isinstance(inputs, dict) and inputs.get("raw") == "true" else inputs


def check_form(inputs: Any) -> None:
    """Refuse a request with both `prompt` and `messages`; to be called before the schema."""
    if isinstance(inputs, dict) and "prompt" in inputs and "messages" in inputs:
        raise AiError(5006, "oneOf at '/' not met, 2 matches: expected either 'prompt' or 'messages'")


def check_types(inputs: Mapping[str, Any]) -> None:
    """Check fields that count in both forms of request though the pages declare them in one."""
    for name, wanted, kind in (("raw", "boolean", bool), ("lora", "string", str)):
        if name in inputs and not isinstance(inputs[name], kind):
            given = type_name(inputs[name])
            pair = f"'{wanted}' not in '{given}'" if inputs[name] is None else f"'{given}' not in '{wanted}'"
            raise AiError(5006, f"Type mismatch of '/{name}', {pair}")


def check_max_tokens(inputs: Mapping[str, Any]) -> None:
    """Demand room for at least one token, where the pages give no minimum."""
    if inputs.get("max_tokens", 1) < 1:
        raise AiError(5006, "'/max_tokens' must be >= 1")


def check_image(inputs: Mapping[str, Any], fields: Mapping[str, Any], page: Page) -> None:
    """Refuse an image where the page declares one: left out in silence, the answer would be made up.

    To be called before the schema, which looks at every number of an image.
    """
    if "image" in inputs and "image" in fields:
        raise AiError(5006, f"{page.model} reads text only: leave out '/image'")


def check_counts(inputs: Mapping[str, Any], fields: Mapping[str, Any], page: Page) -> None:
    """Bound what a request has many of; to be called before the schema, which looks at each."""
    if "messages" in fields and isinstance(inputs.get("messages"), list):
        check_messages(len(inputs["messages"]), page.model, page.context)
    for name in ("tools", "functions"):
        if name in fields and isinstance(inputs.get(name), list) and len(inputs[name]) > MOST_TOOLS:
            raise AiError(5006, f"Length of '/{name}' must be <= {MOST_TOOLS}")
    for name in ("response_format", *({"tools"} & fields.keys())):
        if sum(len(value) for level in _levels(inputs.get(name)) for value in level) > MOST_VALUES:
            raise AiError(5006, f"'/{name}' holds more than {MOST_VALUES} values, too many for any prompt")


def check_messages(count: int, model: str, context: int) -> None:
    """Bound the number of messages, none of which takes less than a token."""
    if count >= context:
        raise AiError(5006, f"the prompt has {count} messages, too many for {too_long(model, context)}")


def too_long(model: str, context: int) -> str:
    """What a prompt is too long for."""
    return f"the context of {context} tokens that {model} has for prompt and answer: shorten it"


def check_json_mode(inputs: Mapping[str, Any]) -> None:
    """Check ``response_format``, which the guide to JSON mode describes and the pages do not declare."""
    if "response_format" in inputs:
        check_format(inputs["response_format"])
        if inputs.get("stream"):
            raise AiError(5006, "JSON mode does not stream: leave out '/stream' or '/response_format'")
