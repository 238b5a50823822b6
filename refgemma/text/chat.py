r"""A conversation as Gemma was trained on it: ``<bos>``, then ``<start_of_turn>ROLE\nTEXT<end_of_turn>\n`` a turn.

Gemma was trained on the roles user and model only. The policy "published" reproduces, character for character, the
template that comes with Gemma 1 and 2 on Hugging Face; "default" also takes a system text and tool results, and no text
can pose as a marker.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from refgemma.errors import InputError, InputTypeError
from refgemma.text.tokenizer import TURN_MARKERS, Tokenizer, checked_text
from refgemma.text.tools import render_results

Policy = Literal["default", "published"]

ROLES = ("system", "user", "assistant", "model", "tool")

# Errors in the words of the published template and of the engine that runs it, so that a comparison finds them equal.
NO_SYSTEM = "System role not supported"
NO_ALTERNATION = "Conversation roles must alternate user/assistant/user/assistant/..."
NO_MESSAGES = "list object has no element 0"
NO_ROLE = "'dict object' has no attribute 'role'"


class Turn(NamedTuple):
    """One turn: the role as it is written, and the text after its newline."""

    role: str
    text: str


def render(
    messages: Iterable[Mapping[str, Any]], *, policy: Policy = "default", add_generation_prompt: bool = True
) -> str:
    r"""Write a conversation out as one string.

    Parameters
    ----------
    messages : iterable of mapping
        ``{"role": str, "content": str}`` each, oldest first.
    policy : {"default", "published"}, default "default"
        Which rules to follow, see Notes.
    add_generation_prompt : bool, default True
        End with an open model turn, even where the last message is the model's.

    Returns
    -------
    str
        The conversation, ``<bos>`` included. In the default policy this is for reading: a marker typed by a
        user looks like a real one here; only `encode_chat` keeps the two apart.

    Raises
    ------
    TypeError
        If `messages` is not a list of mappings, or (default policy) a content is not text.
    ValueError
        If the messages break the rules of the policy.

    Warns
    -----
    UserWarning
        If a message begins with ``<bos>``, which every conversation starts with anyway. In the default policy, also
        if a turn gets a role that Gemma was not trained on.

    Notes
    -----
    In both policies texts lose the white space at their ends, ``assistant`` is written ``model``, an empty text is an
    empty turn, and the user and the model take turns, the user first.

    "default"
        Roles are system, user, assistant or model, and tool, and every content is text. System messages at the start
        are joined by blank lines and put, with a blank line, before the first user text. A tool message after a model
        turn becomes a user turn, labelled by `render_results`, which the other results of that round and a user
        message right after them join. A tool or system message in the place of an answer is written under its own
        name, as the published template does, with a warning.

    "published"
        A system message at the start is an error. In the place of an answer, any role but user passes, under its own
        name. Content that is not text is written as Python prints it, missing content as nothing.

    References
    ----------
    ``chat_template`` in the ``tokenizer_config.json`` of google/gemma-2b-it; the same text is in llama.cpp as
    ``models/templates/google-gemma-2-2b-it.jinja``. Google, "Gemma formatting and system instructions", ai.google.dev.

    Examples
    --------
    >>> render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hello "}])
    '<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\n'
    """
    return _write(_to_turns(messages, policy), add_generation_prompt)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Iterable[Mapping[str, Any]],
    *,
    policy: Policy = "default",
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a conversation.

    Parameters
    ----------
    tokenizer : Tokenizer
        The vocabulary.
    messages : iterable of mapping
        As in `render`.
    policy : {"default", "published"}, default "default"
        "default" places markers by id and encodes each text so that none is found in it. "published" encodes the
        rendered string with all control text live, as Hugging Face does: a message can then end its own turn.
    add_generation_prompt : bool, default True
        End with an open model turn.

    Returns
    -------
    list of int
        Ids in [0, V), ``<bos>`` first; in the default policy nowhere else.

    Raises
    ------
    TypeError
        As in `render`.
    ValueError
        As in `render`, or if a text holds half a surrogate pair.

    Warns
    -----
    UserWarning
        As in `render`.

    Notes
    -----
    Role, newline and text are encoded as one run, as in training. In the default policy, turn markers and controls in
    a text are plain characters. Markers with no meaning in a conversation (``<mask>``, ``<unused0>``) stay what
    SentencePiece makes of them; `Tokenizer.encode` is stricter.
    """
    turns = _to_turns(messages, policy)
    if policy == "published":
        return tokenizer.encode(_write(turns, add_generation_prompt), control="all")
    newline = tokenizer.encode_inert("\n", TURN_MARKERS)
    ids = [tokenizer.bos_id]
    for role, text in turns:
        ids.append(tokenizer.start_of_turn_id)
        ids += tokenizer.encode_inert(f"{role}\n{text}", TURN_MARKERS)
        ids += [tokenizer.end_of_turn_id, *newline]
    if add_generation_prompt:
        ids += [tokenizer.start_of_turn_id, *tokenizer.encode_inert("model\n", TURN_MARKERS)]
    return ids


def _write(turns: list[Turn], add_generation_prompt: bool) -> str:
    text = "<bos>" + "".join(f"<start_of_turn>{role}\n{text}<end_of_turn>\n" for role, text in turns)
    return text + "<start_of_turn>model\n" if add_generation_prompt else text


def _to_turns(messages: Iterable[Mapping[str, Any]], policy: str) -> list[Turn]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise InputTypeError(f"messages is {messages!r:.60}: expected a list of {{'role': ..., 'content': ...}}")
    messages = list(messages)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputTypeError(f"messages[{index}] is {message!r:.60}: expected {{'role': ..., 'content': ...}}")
        if not isinstance(message.get("role", ""), str):
            raise InputTypeError(f"messages[{index}]: role is {message['role']!r:.60}: expected text")
        content = message.get("content")
        if isinstance(content, str) and content.strip().startswith("<bos>"):
            text = f"messages[{index}] begins with <bos>, which every conversation starts with anyway: leave it out"
            warnings.warn(text, stacklevel=3)
    if policy == "default":
        return _default_turns(messages)
    if policy == "published":
        return _published_turns(messages)
    raise InputError(f"policy is {policy!r}: expected 'default' or 'published'")


def _published_turns(messages: list[Mapping[str, Any]]) -> list[Turn]:
    """The published template, statement by statement, with its errors."""
    if not messages:
        raise InputError(NO_MESSAGES)
    if messages[0].get("role") == "system":
        raise InputError(NO_SYSTEM)
    turns = []
    for index, message in enumerate(messages):
        role = message.get("role")
        if (role == "user") != (index % 2 == 0):
            raise InputError(NO_ALTERNATION)
        if role is None:
            raise InputError(NO_ROLE)
        turns.append(Turn("model" if role == "assistant" else role, str(message.get("content", "")).strip()))
    return turns


def _default_turns(messages: list[Mapping[str, Any]]) -> list[Turn]:
    """The rules in the notes of `render`."""
    pairs = []
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if key not in message:
                raise InputError(f"messages[{index}] has no {key!r}: expected {{'role': ..., 'content': ...}}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise InputError(f"messages[{index}]: role is {role!r:.60}: expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputTypeError(f"messages[{index}]: content is {content!r:.60}: expected text, a str")
        pairs.append(("model" if role == "assistant" else role, checked_text(content).strip()))
    system = [text for _, text in takewhile(lambda pair: pair[0] == "system", pairs)]
    if len(system) == len(pairs):
        raise InputError(f"there are no messages{' but from system' if system else ''}: expected one from the user")

    turns: list[Turn] = []
    in_results = False  # the last turn holds tool results and is open for more
    for index, (role, text) in enumerate(pairs[len(system) :], start=len(system)):
        users_turn = len(turns) % 2 == 0
        if in_results and role in ("tool", "user"):
            more = render_results([text]) if role == "tool" else text
            turns[-1] = Turn("user", f"{turns[-1].text}\n{more}".strip())
        elif role == "tool" and users_turn and turns:
            turns.append(Turn("user", render_results([text])))
        elif (role == "user") == users_turn:
            turns.append(Turn(role, text))
            if role in ("system", "tool"):
                warning = f"messages[{index}] makes a {role} turn, which Gemma was not trained on: expected an answer"
                warnings.warn(warning, stacklevel=4)
        else:
            speaker = "the user" if users_turn else "the model"
            raise InputError(
                f"messages[{index}] is from {role!r} where {speaker} speaks: expected the two to alternate"
            )
        in_results = role == "tool" and turns[-1].role == "user"

    turns[0] = Turn("user", "\n\n".join(filter(None, [*system, turns[0].text])))
    return turns
