"""Tokens in, text out as soon as it is certain, and where an answer ends.

A character without a piece of its own is spelled in up to four byte tokens, so a stream has to wait for the last of
them. Every other piece is decoded by itself.

An answer ends at ``<eos>``, ``<end_of_turn>``, ids from the model's own files, and a user's stop texts. The ids are
looked up by name: Gemma 1 and 2 end a turn with id 107, which is a newline in Gemma 3, so a copied number stops Gemma 3
at the first line end, https://github.com/mlc-ai/mlc-llm/pull/3191.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from refgemma.config import json_object
from refgemma.errors import InputError
from refgemma.text.tokenizer import Tokenizer


class StreamDecoder:
    """Text of a growing list of tokens, in whole characters.

    Parameters
    ----------
    tokenizer : Tokenizer
        The vocabulary of the tokens.

    Notes
    -----
    The returned texts, joined, equal `Tokenizer.decode` of all tokens. Only the bytes of a character that may yet be
    completed are held back, three at most, so the cost of a token does not grow with the text.

    Examples
    --------
    ::

        decoder = StreamDecoder(tokenizer)
        for token in tokens:
            print(decoder.feed(token), end="")
        print(decoder.flush())
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def feed(self, token: SupportsIndex) -> str:
        """Take the next token.

        Parameters
        ----------
        token : int
            An id in [0, V).

        Returns
        -------
        str
            The text that became certain; empty in the middle of a character.

        Raises
        ------
        TypeError
            If `token` is not a whole number.
        ValueError
            If it is outside the vocabulary.
        """
        values = self._tokenizer.byte_values
        tokens = [*self._held, operator.index(token)]
        keep = _unfinished([values[i] for i in tokens]) if tokens[-1] in values else 0
        text = self._tokenizer.decode(tokens[: len(tokens) - keep])
        self._held = tokens[len(tokens) - keep :]
        return text

    def flush(self) -> str:
        """End the text.

        Returns
        -------
        str
            U+FFFD for each byte of a character that was never completed. The decoder can then be used again.
        """
        text = self._tokenizer.decode(self._held)
        self._held = []
        return text


def _unfinished(run: list[int]) -> int:
    """How many bytes at the end of `run` begin a UTF-8 character that more bytes may complete.

    A lead byte never continues another character, so every decoder starts afresh at it: cutting there changes nothing,
    whether the bytes before and after are valid or not.
    """
    for length, byte in enumerate(reversed(run[-3:]), start=1):
        if byte < 0x80:  # a character of its own
            return 0
        if byte >= 0xC0:  # a lead byte, which announces how long its character is
            announced = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF8 else 1
            return length if length < announced else 0
    return 0


# ---- where an answer ends


def stop_ids(tokenizer: Tokenizer, generation_config: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """Token ids that end an answer.

    Parameters
    ----------
    tokenizer : Tokenizer
        The vocabulary.
    generation_config : mapping, optional
        Fields of a ``generation_config.json``; its ``eos_token_id`` is one id or a list of them.

    Returns
    -------
    tuple of int
        Those of the configuration, ``<eos>`` and ``<end_of_turn>``, ascending, each once.

    Raises
    ------
    ValueError
        If ``eos_token_id`` is not an id of this vocabulary.

    Notes
    -----
    Gemma 1 ends some answers with ``<eos>`` and some with ``<end_of_turn>``:
    https://github.com/huggingface/transformers/issues/32110.
    """
    given = (generation_config or {}).get("eos_token_id")
    ids = given if isinstance(given, list | tuple) else [] if given is None else [given]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < tokenizer.vocab_size:
            raise InputError(
                f"eos_token_id holds {i!r}: expected whole numbers from 0 to {tokenizer.vocab_size - 1}, one or a list"
            )
    return tuple(sorted({*ids, tokenizer.eos_id, tokenizer.end_of_turn_id}))


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """Read the ``generation_config.json`` of a model folder.

    Parameters
    ----------
    folder : str or Path
        The folder. The file is optional: many copies of a model lack it.

    Returns
    -------
    dict
        Its fields; empty if the file does not exist.

    Raises
    ------
    ValueError
        If the file is not a JSON object.
    """
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return {}
    return json_object(path.read_bytes(), path, "a generation configuration")


def split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Split text that may hold a stop text, or the beginning of one at its end."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[: min(found)], "", True
    begun = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    certain = len(text) - begun
    return text[:certain], text[certain:], False
