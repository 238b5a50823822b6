"""Tokens in, text out as soon as it is certain, and never half a character.

A character without a piece of its own is spelled in up to four byte tokens, so a stream has to wait for the
last of them. Every other piece is decoded by itself.
"""

from __future__ import annotations

import operator
from typing import SupportsIndex

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
