"""The record of a generation: the logits before each decision, the uniform numbers, the settings, the tokens.

All else follows from these four and is worked out when it is asked for, by the very steps that made the decisions.
"""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refgemma.errors import InputTypeError
from refgemma.numerics import Array
from refgemma.sampling.decision import Decision, decide
from refgemma.sampling.entry import Entry
from refgemma.sampling.explain import explain, why_not
from refgemma.sampling.observe import observe
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.replay import Replay, replay


def no_piece(token: int) -> str:
    """Spell tokens where there is no tokenizer."""
    return ""


def plain_uniforms(values: object) -> tuple[float, ...]:
    """Uniform numbers as plain floats, or a sentence on what is wrong."""
    given = tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else (None,)
    numeric = [float(u) for u in given if not isinstance(u, bool) and isinstance(u, numbers.Real)]
    if len(numeric) < len(given):
        raise InputTypeError(f"uniforms are {values!r:.60}: expected a list of numbers in [0, 1), one for each token")
    return tuple(numeric)


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """Every decision of one output.

    Attributes
    ----------
    params : SamplingParams
        The settings, with the seed that was used; None where the uniform numbers came from elsewhere.
    prompt_tokens : tuple of int
        What was read.
    tokens : tuple of int
        What was chosen, T of them.
    uniforms : tuple of float
        The T uniform numbers.
    logits : sequence of ndarray, each of shape (V,)
        What the model gave before each decision, in its own dtype. A row of float32 takes a megabyte at V = 256,000.
    piece : callable
        Id to the tokenizer's name of it, such as ``▁cat``; empty where that is not known.

    Notes
    -----
    Iterating over a record, or ``record[t]``, gives an `Entry` for each token; they are worked out once.
    """

    params: SamplingParams
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    uniforms: tuple[float, ...]
    logits: Sequence[Array] | Array
    piece: Callable[[int], str] = no_piece

    def __post_init__(self) -> None:
        settle = functools.partial(object.__setattr__, self)  # frozen, but arrays are to become plain numbers
        try:
            settle("prompt_tokens", tuple(map(operator.index, self.prompt_tokens)))
            settle("tokens", tuple(map(operator.index, self.tokens)))
        except TypeError:
            raise InputTypeError("prompt_tokens or tokens of the record are no list of token ids") from None
        settle("uniforms", plain_uniforms(self.uniforms))

    def __repr__(self) -> str:
        return f"Record({len(self)} tokens after {len(self.prompt_tokens)}, V={self.vocab_size})"

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Entry]:
        return (self[t] for t in range(len(self)))

    def __getitem__(self, t: int) -> Entry:
        index = self._index(t)
        if index not in self._entries:
            self._entries[index] = observe(
                self.logits[index],
                self.params,
                self.prompt_tokens,
                self.tokens[:index],
                self.uniforms[index],
                self.tokens[index],
            )
        return self._entries[index]

    @functools.cached_property
    def _entries(self) -> dict[int, Entry]:
        return {}

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.logits[0])

    def decision(self, t: int) -> Decision:
        """Make a decision again, and keep what each step did.

        Parameters
        ----------
        t : int
            Which output token; negative numbers count from the end.

        Returns
        -------
        Decision
            With its stages.
        """
        t = self._index(t)
        return decide(self.logits[t], self.params, self.prompt_tokens, self.tokens[:t], self.uniforms[t], record=True)

    def text(self, token: int) -> str:
        """Name a token readably.

        Parameters
        ----------
        token : int
            Its id.

        Returns
        -------
        str
            Its text in quotes and its id, or the id alone where the text is not known.
        """
        piece = self.piece(token)
        return f"{piece.replace('▁', ' ')!r} ({token})" if piece else f"token {token}"

    def explain(self, t: int) -> str:
        """Tell how a token came about.

        Parameters
        ----------
        t : int
            Which output token; negative numbers count from the end.

        Returns
        -------
        str
            A paragraph.
        """
        return explain(self, self._index(t))

    def why_not(self, t: int, token: int) -> str:
        """Tell why another token did not come.

        Parameters
        ----------
        t : int
            Which output token; negative numbers count from the end.
        token : int
            The other token's id.

        Returns
        -------
        str
            Which step removed it and by how much, or that none did and where u fell.

        Raises
        ------
        ValueError
            If it is outside the vocabulary.
        """
        return why_not(self, self._index(t), token)

    def replay(self, **changes: Any) -> Replay:
        """Decide again, with other settings if any are given, up to the first token that differs.

        Parameters
        ----------
        **changes
            Fields of `SamplingParams`. With a `seed`, the uniform numbers are drawn anew.

        Returns
        -------
        Replay
            The tokens, the first that differs, and why.

        Raises
        ------
        ValueError
            If a setting is unknown, out of range, or plays no part in a decision.
        """
        return replay(self, changes)

    def save(self, path: str | Path) -> None:
        """Write the record: JSON lines, and the logits in a safetensors file beside them.

        Parameters
        ----------
        path : str or Path
            Of the first, such as ``run.jsonl``; the second is then ``run.logits.safetensors``. See
            `refgemma.sampling.record_file`.
        """
        from refgemma.sampling.record_file import write_record  # which makes records when it reads them

        write_record(self, path)

    def _index(self, t: int) -> int:
        index = operator.index(t)
        if not -len(self) <= index < len(self):
            raise IndexError(f"token {t} is not in the record: expected 0 to {len(self) - 1}")
        return index % len(self)
