"""Records of decisions that were not made here: the logits of any model, and what another engine chose from them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from refgemma.errors import InputError
from refgemma.sampling.checks import check_ids
from refgemma.sampling.decision import decide, seed_of, uniform
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.record import Record, no_piece, plain_uniforms


def record_logits(
    logits: ArrayLike,
    params: SamplingParams,
    *,
    prompt_tokens: Sequence[int] = (),
    uniforms: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None,
    piece: Callable[[int], str] = no_piece,
) -> Record:
    """Make a record of the logits of any model.

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
        If token ids are no whole numbers, or `uniforms` are no list of numbers.
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
        seed = seed_of(params)
        params = replace(params, seed=seed)
        uniforms = [uniform(seed, t) for t in range(T)]
    uniforms = plain_uniforms(uniforms)
    given = None if tokens is None else check_ids("tokens", tokens, rows.shape[1])
    for name, values in (("uniforms", uniforms), ("tokens", given)):
        if values is not None and len(values) != T:
            raise InputError(f"{len(values)} {name} were given for {T} rows of logits: expected one for each")
    output: list[int] = []
    for t, (row, u) in enumerate(zip(rows, uniforms, strict=True)):
        try:
            drawn = decide(row, params, prompt_tokens, output, u).token
        except ValueError as error:
            raise InputError(f"token {t}: {error}") from None
        output.append(drawn if given is None else given[t])
    return Record(
        params=params,
        prompt_tokens=tuple(map(operator.index, prompt_tokens)),
        tokens=tuple(output),
        uniforms=uniforms,
        logits=rows,
        piece=piece,
    )
