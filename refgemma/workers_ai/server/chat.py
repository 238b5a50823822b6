"""``POST …/ai/v1/chat/completions``: OpenAI's request turned into a native one, and the answer into OpenAI's.

What such a request may hold beyond the native one either has the same effect here, or none on the answer, or is
refused in a sentence; `_INERT` and `_REFUSED` list them.

References
----------
https://developers.cloudflare.com/workers-ai/configuration/open-ai-compatibility/
https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.pages import HOSTED, page
from refgemma.workers_ai.request import check_counts, check_depth
from refgemma.workers_ai.schema import join, problems, short

# Same name, same meaning.
_SAME = ("temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty", "lora")
# With these values, and for the rest of them with any, no effect on one answer.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"n": (1,), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},)}
_MOST_STOPS = 4


class ChatRequest(NamedTuple):
    """A native request, and what has no place in one."""

    model: str
    inputs: dict[str, Any]
    stop: tuple[str, ...]
    include_usage: bool


def read_chat(body: Any) -> ChatRequest:
    """Translate a request."""
    if not isinstance(body, dict):
        raise AiError(5006, "the body is no object: expected model and messages")
    given = {name: value for name, value in body.items() if value is not None}
    if not isinstance(given.get("model"), str):
        raise AiError(5006, "required properties at '/' are 'model'")
    for name, values in _NEUTRAL.items():
        if name in given and not any(given[name] == value and type(given[name]) is type(value) for value in values):
            raise AiError(5006, f"'/{name}' is not supported here: leave it out")
    if given["model"] in HOSTED:  # which it may not be is said where it is looked up
        its_page = page(given["model"])
        check_counts(given, its_page, its_page.fields("messages"))
    inputs = {name: given[name] for name in _SAME if name in given}
    if "max_completion_tokens" in given or "max_tokens" in given:
        inputs["max_tokens"] = given.get("max_completion_tokens", given.get("max_tokens"))
    if "messages" in given:
        inputs["messages"] = _messages(given["messages"])
    if _wants_tools(given):
        inputs["tools"] = _tools(given["tools"])
    if (wanted := _format(given.get("response_format"))) is not None:
        inputs["response_format"] = wanted
    stream = given.get("stream", False)
    inputs["stream"] = stream
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or (options and stream is not True):
        raise AiError(5006, "'/stream_options' must be an object, and goes with '/stream'")
    return ChatRequest(given["model"], inputs, _stop(given.get("stop")), options.get("include_usage") is True)


def check_messages(chat: ChatRequest) -> None:
    """Validate a request by what its model's page says of messages alone.

    The whole schema, which goes on to validate it, would miss a `prompt` first, and this interface has none.
    """
    if chat.model not in HOSTED:
        return
    check_depth(chat.inputs)
    if found := problems(chat.inputs, page(chat.model).branch("messages")):
        raise AiError(5006, join(found))


def _messages(messages: Any) -> Any:
    """Messages as the native interface has them; what is malformed is left for its schema to name."""
    return list(map(_message, messages)) if isinstance(messages, list) else messages


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    role, content = message.get("role"), message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    calls = message.get("tool_calls")
    plain = {name: value for name, value in message.items() if name != "tool_calls" or calls}
    return plain | {"role": "system" if role == "developer" else role, "content": content}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _wants_tools(given: Mapping[str, Any]) -> bool:
    choice = given.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise AiError(5006, '\'/tool_choice\' must be one of "auto", "none": generation cannot be forced here')
    return "tools" in given and choice == "auto"


def _tools(tools: Any) -> Any:
    """Tools with the descriptions that the page's schema wants everywhere, and OpenAI's need not have."""
    return list(map(_tool, tools)) if isinstance(tools, list) else tools


def _tool(tool: Any) -> Any:
    if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
        return tool
    function = {"description": "", "parameters": {}} | tool["function"]
    parameters = function["parameters"]
    if isinstance(parameters, dict):
        parameters = {"type": "object", "properties": {}} | parameters
        if isinstance(parameters["properties"], dict):
            parameters["properties"] = {n: _described(p) for n, p in parameters["properties"].items()}
        function["parameters"] = parameters
    return tool | {"function": function}


def _described(declared: Any) -> Any:
    return {"type": "string", "description": ""} | declared if isinstance(declared, dict) else declared


def _format(wanted: Any) -> Any:
    if isinstance(wanted, dict) and wanted.get("type") == "text":
        return None
    if isinstance(wanted, dict) and isinstance(wanted.get("json_schema"), dict) and "schema" in wanted["json_schema"]:
        return wanted | {"json_schema": wanted["json_schema"]["schema"]}
    return wanted


def _stop(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(texts, list) or len(texts) > _MOST_STOPS or not all(isinstance(t, str) and t for t in texts):
        raise AiError(5006, f"'/stop' is {short(json.dumps(stop))}: expected at most {_MOST_STOPS} texts, none empty")
    return tuple(texts)
