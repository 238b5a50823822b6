"""A request for a hosted model: validated by its page's schema and by further rules, and mapped to `SamplingParams`.

A rule is a choice where the pages are silent or allow what has no meaning; the README lists them in "What we assume".
Rules that bound the number of values run before the schema, which looks at each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from refgemma.errors import InputError
from refgemma.gemma import Gemma
from refgemma.sampling import SamplingParams
from refgemma.text.tools import normalize_tools
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.pages import HOSTED, Page, page
from refgemma.workers_ai.prompt import answer_schema, check_format, encode
from refgemma.workers_ai.schema import Schema, join, problems, short, type_name

TEMPERATURE = 0.6  # the default of the 2B page; the other page has none
MAX_TOKENS = 256  # the default of both
# A logit divided by less than this may overflow. Such a penalty counts as 0, which is off.
SMALLEST_PENALTY = 1e-290
MOST_TOOLS = 128  # OpenAI's limit; no prompt holds more. Applies to functions as well
MOST_VALUES = 50_000  # inside the tools, and in a schema for answers: several times the context length
DEEPEST = 64  # levels of lists and objects, well below the interpreter's recursion limit


@dataclass(frozen=True, kw_only=True)
class Request:
    """A validated request.

    Parameters
    ----------
    model : str
        Hosted name.
    messages : tuple of mapping
        The conversation; empty where `raw` is given.
    raw : str or None
        Text to continue without a template.
    params : SamplingParams
        Sampling settings; `settings` limits ``max_tokens`` for a prompt.
    stream : bool
        Whether the answer is a stream of events.
    lora : str or None
        Id or name of a finetune.
    tools : tuple of dict
        Declarations in their flat form.
    answer_schema : mapping or None
        JSON Schema that the answer must fit, if JSON mode is on.
    """

    model: str
    messages: tuple[Mapping[str, Any], ...] = ()
    raw: str | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    stream: bool = False
    lora: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    answer_schema: Schema | None = None

    def tokens(self, gemma: Gemma) -> list[int]:
        """Encode the prompt.

        Parameters
        ----------
        gemma : Gemma
            The model that answers.

        Returns
        -------
        list of int
            Ids, ``<bos>`` first.

        Raises
        ------
        AiError
            5006, if the conversation cannot be rendered, or leaves no room in the context for an answer.
        """
        context = self.context(gemma)
        check_messages(len(self.messages), self.model, context)  # again: a local model's may be smaller
        ids = encode(gemma, self.messages, raw=self.raw, tools=self.tools, answer_schema=self.answer_schema)
        if len(ids) >= context:
            raise AiError(5006, f"the prompt has {len(ids)} tokens, too many for {_too_long(self.model, context)}")
        return ids

    def settings(self, gemma: Gemma, tokens: list[int]) -> SamplingParams:
        """Return the sampling settings for a prompt.

        Parameters
        ----------
        gemma : Gemma
            The model that answers.
        tokens : list of int
            The prompt, from `tokens`.

        Returns
        -------
        SamplingParams
            With ``max_tokens`` limited to the rest of the context.
        """
        room = self.context(gemma) - len(tokens)
        return replace(self.params, max_tokens=min(self.params.max_tokens, room))

    def context(self, gemma: Gemma) -> int:
        """Return the context length, of prompt and answer together.

        Parameters
        ----------
        gemma : Gemma
            The model that answers.

        Returns
        -------
        int
            That of the hosted or of the local model, whichever is smaller.
        """
        return context_length(self.model, gemma)


def context_length(model: str, gemma: Gemma) -> int:
    """Return the context of a hosted model, or of the local one that answers for it, if that is shorter."""
    return min(page(model).context, gemma.config.max_positions)


def read(model: str, inputs: Any) -> Request:
    """Validate a request and map it to settings.

    Parameters
    ----------
    model : str
        Hosted name.
    inputs : object
        The request's body, as `json.loads` returns it.

    Returns
    -------
    Request
        What it asks for.

    Raises
    ------
    AiError
        5007, if there is no such model; 5006, if the inputs are invalid.
    """
    if model not in HOSTED:
        raise AiError(5007, f"No such model {short(model)} or task")
    its_page = page(model)
    form = "messages" if isinstance(inputs, dict) and "messages" in inputs else "prompt"
    fields = its_page.fields(form)
    check_depth(inputs)
    if isinstance(inputs, dict):
        if "prompt" in inputs and form == "messages":
            raise AiError(5006, "oneOf at '/' not met, 2 matches: expected either 'prompt' or 'messages'")
        if inputs.get("raw") == "true":  # as the curl example of both pages sends it
            inputs = inputs | {"raw": True}
        if "image" in inputs and "image" in fields:  # were it ignored, the answer would be made up
            raise AiError(5006, f"{model} reads text only: leave out '/image'")
        check_counts(inputs, its_page, fields)
    if found := problems(inputs, its_page.schema):
        raise AiError(5006, join(found))
    _check_fields(inputs)
    messages = inputs.get("messages") or [{"role": "user", "content": inputs.get("prompt", "")}]
    if form == "messages" and not inputs["messages"]:
        raise AiError(5006, "'/messages' is empty: expected at least one message")
    raw = inputs.get("raw", False)
    given_format = inputs.get("response_format")
    return Request(
        model=model,
        messages=() if raw else tuple(messages),
        raw="".join(message["content"] for message in messages) if raw else None,
        params=_params(inputs, fields),
        stream=inputs.get("stream", False),
        lora=inputs.get("lora"),
        tools=_tools(inputs) if "tools" in fields else (),
        answer_schema=answer_schema(given_format) if given_format else None,
    )


def check_depth(inputs: Any) -> None:
    """Refuse inputs that are nested too deep."""
    for depth, _ in enumerate(_levels(inputs)):
        if depth == DEEPEST:
            raise AiError(5006, f"lists and objects are nested more than {DEEPEST} deep")


def _levels(value: Any) -> Iterator[list[Any]]:
    """Yield the non-empty lists and objects level by level; of empty ones there may be a million."""
    level = [value] if value and isinstance(value, dict | list) else []
    while level:
        yield level
        children = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for inner in children for value in inner if value and isinstance(value, dict | list)]


def check_counts(inputs: Mapping[str, Any], its_page: Page, fields: Mapping[str, Any]) -> None:
    """Bound the messages, the tools and the values inside them."""
    if "messages" in fields and isinstance(inputs.get("messages"), list):
        check_messages(len(inputs["messages"]), its_page.model, its_page.context)
    for name in ("tools", "functions"):
        if name in fields and isinstance(inputs.get(name), list) and len(inputs[name]) > MOST_TOOLS:
            raise AiError(5006, f"Length of '/{name}' must be <= {MOST_TOOLS}")
    for name in ("response_format", *({"tools"} & fields.keys())):
        if sum(len(value) for level in _levels(inputs.get(name)) for value in level) > MOST_VALUES:
            raise AiError(5006, f"'/{name}' holds more than {MOST_VALUES} values, too many for any prompt")


def check_messages(count: int, model: str, context: int) -> None:
    """Bound the number of messages, each of which takes at least one token."""
    if count >= context:
        raise AiError(5006, f"the prompt has {count} messages, too many for {_too_long(model, context)}")


def _too_long(model: str, context: int) -> str:
    return f"the context of {context} tokens that {model} has for prompt and answer: shorten it"


def _check_fields(inputs: Mapping[str, Any]) -> None:
    """Check fields that count in both forms of request though the pages declare them in one form or not at all."""
    for name, wanted, kind in (("raw", "boolean", bool), ("lora", "string", str)):
        if name in inputs and not isinstance(inputs[name], kind):
            given = type_name(inputs[name])
            pair = f"'{wanted}' not in '{given}'" if inputs[name] is None else f"'{given}' not in '{wanted}'"
            raise AiError(5006, f"Type mismatch of '/{name}', {pair}")
    if inputs.get("max_tokens", 1) < 1:
        raise AiError(5006, "'/max_tokens' must be >= 1")
    if "response_format" in inputs:
        check_format(inputs["response_format"])
        if inputs.get("stream"):
            raise AiError(5006, "JSON mode does not stream: leave out '/stream' or '/response_format'")


def _params(inputs: Mapping[str, Any], fields: Mapping[str, Any]) -> SamplingParams:
    """Map the settings; a value without a meaning of its own turns its step off."""
    default = fields["temperature"].get("default", TEMPERATURE)
    top_p = inputs.get("top_p")
    penalty = inputs.get("repetition_penalty", 1)
    return SamplingParams(
        temperature=inputs.get("temperature", default),
        top_k=_integer(inputs.get("top_k")),
        top_p=None if top_p is None else min(top_p, 1),
        repetition_penalty=penalty if penalty >= SMALLEST_PENALTY else 1,
        frequency_penalty=inputs.get("frequency_penalty", 0),
        presence_penalty=inputs.get("presence_penalty", 0),
        seed=_integer(inputs.get("seed")),
        max_tokens=int(inputs.get("max_tokens", MAX_TOKENS)),
    )


def _integer(value: float | None) -> int | None:
    """Convert 5.0, which is an integer in JSON Schema."""
    return None if value is None else int(value)


def _tools(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    try:
        return tuple(normalize_tools(inputs.get("tools", ())))
    except InputError as error:
        raise AiError(5006, f"'/tools' cannot be used: {error}") from None
