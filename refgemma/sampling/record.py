"""The record of a generation: the logits before each decision, the uniform numbers, the settings, the tokens.

All else follows from these four and is computed on demand, by the very steps that made the decisions: what happened in
each decision, why, and what other settings would have chosen.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from refgemma.compute.threads import in_parallel
from refgemma.errors import InputError, InputTypeError
from refgemma.numerics import Array
from refgemma.sampling import record_file
from refgemma.sampling.decision import GREEDY_BELOW, Decision, check_ids, decide, seed_of, uniform
from refgemma.sampling.entry import Entry, interval, observe
from refgemma.sampling.explain import explain, span_text, why_not
from refgemma.sampling.params import SamplingParams

_NO_PART = ("max_tokens", "stop")  # settings that play no part in a decision


def no_piece(token: int) -> str:
    """Spell tokens where there is no tokenizer.

    Parameters
    ----------
    token : int
        Any id.

    Returns
    -------
    str
        The empty string.
    """
    return ""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The result of deciding again.

    Attributes
    ----------
    params : SamplingParams
        The settings that were used.
    tokens : tuple of int
        Up to and including the first that differs.
    first_difference : int or None
        Its index; None where all tokens come out as recorded.
    reason : str
        What differs and why, in words.
    """

    params: SamplingParams
    tokens: tuple[int, ...]
    first_difference: int | None
    reason: str


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
    Iterating over a record, or ``record[t]``, gives an `Entry` for each token, computed once.
    """

    params: SamplingParams
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    uniforms: tuple[float, ...]
    logits: Sequence[Array] | Array
    piece: Callable[[int], str] = no_piece

    def __post_init__(self) -> None:
        settle = functools.partial(object.__setattr__, self)  # frozen, but arrays become plain numbers
        try:
            settle("prompt_tokens", tuple(map(operator.index, self.prompt_tokens)))
            settle("tokens", tuple(map(operator.index, self.tokens)))
        except TypeError:
            raise InputTypeError("prompt_tokens or tokens of the record are not lists of token ids") from None
        settle("uniforms", _plain_uniforms(self.uniforms))

    def __repr__(self) -> str:
        return f"Record({len(self)} tokens after {len(self.prompt_tokens)}, V={self.vocab_size})"

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Entry]:
        return (self[t] for t in range(len(self)))

    def __getitem__(self, t: int) -> Entry:
        t = self._index(t)
        if t not in self._entries:
            self._entries[t] = observe(
                self.logits[t], self.params, self.prompt_tokens, self.tokens[:t], self.uniforms[t], self.tokens[t]
            )
        return self._entries[t]

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
        """Explain how a token came about.

        Parameters
        ----------
        t : int
            Which output token; negative numbers count from the end.

        Returns
        -------
        str
            A paragraph.
        """
        return explain(self[t], self.params, self.text)

    def why_not(self, t: int, token: int) -> str:
        """Explain why another token did not come.

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
        t = self._index(t)
        return why_not(token, self.logits[t], self.decision(t), self.params, self.tokens[t], self.text)

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
        params = _changed(self.params, changes)
        tokens: list[int] = []
        for t, (logits, recorded, u) in enumerate(zip(self.logits, self.tokens, self.uniforms, strict=True)):
            if "seed" in changes:
                u = uniform(changes["seed"], t)
            tokens.append(decide(logits, params, self.prompt_tokens, self.tokens[:t], u).token)
            if tokens[t] != recorded:
                other = replace(self, params=params, uniforms=(*self.uniforms[:t], u, *self.uniforms[t + 1 :]))
                return Replay(
                    params=params, tokens=tuple(tokens), first_difference=t, reason=_difference(self, other, t)
                )
        same = f"All {len(tokens)} tokens come out as recorded{_with(self.params, params)}."
        return Replay(params=params, tokens=tuple(tokens), first_difference=None, reason=same)

    def save(self, path: str | Path) -> None:
        """Write the record: JSON lines, and the logits in a safetensors file beside them, each whole or not at all.

        Parameters
        ----------
        path : str or Path
            Of the first, such as ``run.jsonl``; the second is then ``run.logits.safetensors``. See
            `refgemma.sampling.record_file`.

        Raises
        ------
        ValueError
            If the record is empty.
        OSError
            If the files cannot be written, or one of the places is a device, a pipe or a folder.
        """
        in_parallel(self.__getitem__, len(self))  # the record keeps them
        record_file.write(
            path, list(self), self.logits, params=self.params, prompt_tokens=self.prompt_tokens, piece=self.piece
        )

    def _index(self, t: int) -> int:
        index = operator.index(t)
        if not -len(self) <= index < len(self):
            raise IndexError(f"token {t} is not in the record: expected 0 to {len(self) - 1}")
        return index % len(self)


def write_record(record: Record, path: str | Path) -> None:
    """Write a record: the same as ``record.save(path)``.

    Parameters
    ----------
    record : Record
        What to write.
    path : str or Path
        Of the JSON lines.
    """
    record.save(path)


def read_record(path: str | Path) -> Record:
    """Read a record and its logits.

    Parameters
    ----------
    path : str or Path
        Of the JSON lines.

    Returns
    -------
    Record
        Its logits are mapped: they take no memory until they are used.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If a file is cut off, damaged, of another version, or the two do not belong together.
    """
    pieces, fields = record_file.read(path)
    return Record(**fields, piece=(lambda token: pieces.get(str(token), "")) if pieces else no_piece)


def record_logits(
    logits: ArrayLike,
    params: SamplingParams,
    *,
    prompt_tokens: Sequence[int] = (),
    uniforms: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None,
    piece: Callable[[int], str] = no_piece,
) -> Record:
    """Make a record from the logits of any model, and perhaps from what another engine chose.

    Parameters
    ----------
    logits : array_like of float, shape (V,) or (T, V)
        Before each of T decisions.
    params : SamplingParams
        The settings.
    prompt_tokens : sequence of int
        What was read before; the repetition penalty looks at it.
    uniforms : sequence of float, optional
        T numbers in [0, 1). By default those of the seed in `params`, and without one a seed is drawn.
    tokens : sequence of int, optional
        What was chosen, by another engine perhaps. By default what these logits, settings and numbers give.
    piece : callable
        Id to the tokenizer's name of it.

    Returns
    -------
    Record
        Of T tokens.

    Raises
    ------
    ValueError
        If counts do not match, or logits, ids or numbers are out of range.
    TypeError
        If token ids are not whole numbers, or `uniforms` is not a list of numbers.
    """
    try:
        rows = np.asarray(logits)
    except ValueError:
        raise InputError("logits have rows of different lengths: expected (V,), or (T, V) for T tokens") from None
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not rows.size:
        raise InputError(f"logits have shape {rows.shape}: expected (V,), or (T, V) for T tokens")
    T = len(rows)
    if uniforms is None:
        params = replace(params, seed=seed_of(params))
        uniforms = [uniform(seed_of(params), t) for t in range(T)]
    uniforms = _plain_uniforms(uniforms)
    given = None if tokens is None else check_ids("tokens", tokens, rows.shape[1])
    for name, values in (("uniforms", uniforms), ("tokens", given)):
        if values is not None and len(values) != T:
            raise InputError(f"{len(values)} {name} were given for {T} rows of logits: expected one for each")
    output: list[int] = []
    for t, (row, u) in enumerate(zip(rows, uniforms, strict=True)):
        try:
            drawn = decide(row, params, prompt_tokens, output, u).token
        except InputError as error:
            raise InputError(f"token {t}: {error}") from None
        output.append(drawn if given is None else given[t])
    return Record(
        params=params,
        prompt_tokens=tuple(prompt_tokens),
        tokens=tuple(output),
        uniforms=uniforms,
        logits=rows,
        piece=piece,
    )


def _plain_uniforms(values: object) -> tuple[float, ...]:
    """Uniform numbers as plain floats."""
    given = tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else (None,)
    numeric = [float(u) for u in given if not isinstance(u, bool) and isinstance(u, numbers.Real)]
    if len(numeric) < len(given):
        raise InputTypeError(f"uniforms are {values!r:.60}: expected a list of numbers in [0, 1), one for each token")
    return tuple(numeric)


# ---- deciding again, in words


def _changed(params: SamplingParams, changes: Mapping[str, Any]) -> SamplingParams:
    known = [field.name for field in dataclasses.fields(params) if field.name not in _NO_PART]
    for name in changes:
        if name in _NO_PART:
            raise InputError(f"{name} plays no part in a decision: a replay takes {', '.join(known)}")
        if name not in known:
            raise InputError(f"unknown setting {name!r}: a replay takes {', '.join(known)}")
    if "seed" in changes and changes["seed"] is None:
        raise InputError("seed is None: a replay needs a number, or no seed at all for the recorded uniform numbers")
    return replace(params, **changes)


def _difference(record: Record, other: Record, t: int) -> str:
    """What differs at this token and why; `other` has the replaced settings and the same tokens."""
    then, now = record.decision(t), other.decision(t)
    old, new = record.tokens[t], now.token
    differs = f"Token {t} is {record.text(new)} and not {record.text(old)}"
    foreign = f"another engine or other settings must have chosen {record.text(old)}"
    if then.token == new:
        sentences = [f"{differs}, with the recorded settings already: {foreign}.", record.why_not(t, old)]
    else:
        sentences = [f"{differs}{_with(record.params, other.params)}."]
        if then.token != old:
            sentences.append(f"The recorded settings give neither but {record.text(then.token)}: {foreign}.")
        span = interval(now, old)
        if span is None or other.params.temperature < GREEDY_BELOW:
            sentences.append(other.why_not(t, old))
        elif interval(then, new) is None:
            sentences.append(f"In the record, {record.why_not(t, new)}")
        else:  # both tokens were kept both times: an interval or the uniform number moved
            drawn = interval(now, new)
            assert drawn is not None, "it was drawn"
            before = interval(then, old)
            moved = f"moved from {span_text(before)} to" if before is not None and before != span else "is"
            number = f"u = {now.u:.8f}"
            if now.u != then.u:
                number = f"u is now {now.u:.8f}, no longer {then.u:.8f}, and"
            sentences.append(
                f"The interval of {record.text(old)} {moved} {span_text(span)}; {number} falls into "
                f"{span_text(drawn)}, that of {record.text(new)}."
            )
    if t + 1 < len(record):
        sentences.append(
            "The logits recorded after it follow the recorded token, not this one, so they say nothing of how the text "
            "would go on."
        )
    return " ".join(sentences)


def _with(old: SamplingParams, new: SamplingParams) -> str:
    """The settings that differ, as a clause."""
    names = [field.name for field in dataclasses.fields(old) if getattr(old, field.name) != getattr(new, field.name)]
    clauses = [f"{name} {getattr(new, name)} in place of {getattr(old, name)}" for name in names]
    return f" with {' and '.join(clauses)}" if clauses else ""
