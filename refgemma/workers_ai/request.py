"""A request for a hosted model, validated by its page's schema and our rules, and mapped to what refgemma runs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from refgemma.gemma import Gemma
from refgemma.sampling import SamplingParams
from refgemma.text.tools import normalize_tools
from refgemma.workers_ai import json_mode, rules
from refgemma.workers_ai.errors import AiError
from refgemma.workers_ai.pages import HOSTED, page
from refgemma.workers_ai.prompt import encode
from refgemma.workers_ai.schema import Schema, join, problems, short

TEMPERATURE = 0.6  # the default of the 2B page; the other page has none
MAX_TOKENS = 256  # the default of both
# Dividing a logit by less than this may overflow: such a penalty counts as 0, which is off.
SMALLEST_PENALTY = 1e-290


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a request asks for.

    Attributes
    ----------
    model : str
        Hosted name.
    messages : tuple of mapping
        The conversation; empty where `raw` is given.
    raw : str or None
        Text to continue as it stands.
    params : SamplingParams
        How to sample; `settings` fits ``max_tokens`` to a prompt.
    stream : bool
        Whether the answer is to come as events.
    lora : str or None
        Id or name of a finetune.
    tools : tuple of dict
        Declarations in their flat form; empty where there are none.
    answer_schema : mapping or None
        JSON Schema that the answer must fit, in JSON mode.
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
        """Token ids of the prompt.

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
        rules.check_messages(len(self.messages), self.model, context)  # again: a local model may have a smaller one
        ids = encode(gemma, self.messages, raw=self.raw, tools=self.tools, answer_schema=self.answer_schema)
        if len(ids) >= context:
            raise AiError(5006, f"the prompt has {len(ids)} tokens, too many for {rules.too_long(self.model, context)}")
        return ids

    def settings(self, gemma: Gemma, tokens: list[int]) -> SamplingParams:
        """Sampling parameters for a prompt.

        Parameters
        ----------
        gemma : Gemma
            The model that answers.
        tokens : list of int
            The prompt, from `tokens`.

        Returns
        -------
        SamplingParams
            With ``max_tokens`` no larger than what the context leaves.
        """
        room = self.context(gemma) - len(tokens)
        return replace(self.params, max_tokens=min(self.params.max_tokens, room))

    def context(self, gemma: Gemma) -> int:
        """Tokens of prompt and answer together.

        Parameters
        ----------
        gemma : Gemma
            The model that answers.

        Returns
        -------
        int
            What the hosted model has, or the local one, if that is less.
        """
        return min(page(self.model).context, gemma.config.max_positions)


def read(model: str, inputs: Any) -> Request:
    """Validate a request and map it.

    Parameters
    ----------
    model : str
        Hosted name.
    inputs : object
        The request's body, as `json.loads` makes it.

    Returns
    -------
    Request
        What it asks for.

    Raises
    ------
    AiError
        5007, if there is no such model; 5006, if the inputs are not valid.
    """
    if model not in HOSTED:
        raise AiError(5007, f"No such model {short(model)} or task")
    its_page = page(model)
    rules.check_depth(inputs)
    rules.check_form(inputs)
    inputs = rules.with_raw_read(inputs)
    form = "messages" if isinstance(inputs, dict) and "messages" in inputs else "prompt"
    fields = its_page.fields(form)
    if isinstance(inputs, dict):
        rules.check_image(inputs, fields, its_page)
        rules.check_counts(inputs, fields, its_page)
    if found := problems(inputs, its_page.schema):
        raise AiError(5006, join(found))
    rules.check_types(inputs)
    rules.check_max_tokens(inputs)
    rules.check_json_mode(inputs)
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
        answer_schema=json_mode.answer_schema(given_format) if given_format else None,
    )


def _params(inputs: Mapping[str, Any], fields: Mapping[str, Any]) -> SamplingParams:
    """The settings in our terms; what has no meaning there was refused, or is off."""
    default = fields["temperature"].get("default", TEMPERATURE)
    top_p = inputs.get("top_p")
    penalty = inputs.get("repetition_penalty", 1)
    return SamplingParams(
        temperature=inputs.get("temperature", default),
        top_k=_whole(inputs.get("top_k")),
        top_p=None if top_p is None else min(top_p, 1),
        repetition_penalty=penalty if penalty >= SMALLEST_PENALTY else 1,
        frequency_penalty=inputs.get("frequency_penalty", 0),
        presence_penalty=inputs.get("presence_penalty", 0),
        seed=_whole(inputs.get("seed")),
        max_tokens=int(inputs.get("max_tokens", MAX_TOKENS)),
    )


def _whole(value: float | None) -> int | None:
    """JSON Schema takes 5.0 for an integer."""
    return None if value is None else int(value)


def _tools(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    try:
        return tuple(normalize_tools(inputs.get("tools", ())))
    except ValueError as error:
        raise AiError(5006, f"'/tools' cannot be used: {error}") from None
