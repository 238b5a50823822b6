"""What a model gives for a published figure, one function a kind, and how far that is from what was published."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from refgemma.errors import InputError
from refgemma.gemma import Gemma
from refgemma.numerics import Array
from refgemma.oracle.published.figures import Figure
from refgemma.oracle.published.scores import ids_of, ids_up_to, logprobs_of, probs_of, row_of, rows, text_of

_LONGEST = 28  # letters of a text that are shown

# How far below our best logit a published token may be, by the format its engine computed in. bfloat16 is spaced by
# 0.125 to 0.25 for logits of 16 to 64, two of them are compared, and the layers before add as much again: five runs of
# one request differ by 0.1. float16 is 8 times finer; float32 leaves the order of summation, over 18 layers.
NEAR_TIE = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.5, "8-bit weights": 0.5, "unknown": 0.5}


@dataclass(frozen=True)
class Measured:
    """Ours beside the published."""

    published: str  # both, in short: of several numbers the pair that is farthest apart, relative to the tolerance
    ours: str  # both, in short: of several numbers the pair that is farthest apart, relative to the tolerance
    tolerance: str  # how far they may be apart
    problem: str | None  # what is wrong, in a sentence; None if nothing is
    values: list[float] | str  # all of ours


def measure(gemma: Gemma, figure: Figure) -> Measured:
    """Compute a figure."""
    if figure.kind not in MEASURES:
        raise InputError(f"{figure.kind!r} is no kind of figure: there are {', '.join(MEASURES)}")
    try:
        return MEASURES[figure.kind](gemma, figure)
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"the figure cannot be read: {error!r:.80}") from None


def _logit_mean(gemma: Gemma, figure: Figure) -> Measured:
    """Mean over the vocabulary, at every position."""
    means = [part.mean(axis=-1) for part in rows(gemma, ids_of(gemma, figure.fields))]
    return _compared(np.concatenate(means), figure.fields)


def _logits_slice(gemma: Gemma, figure: Figure) -> Measured:
    """Some logits at one position; columns that the table does not have are left out."""
    fields = figure.fields
    columns = np.array(fields["columns"])
    there = columns < gemma.config.vocab_size
    row = row_of(gemma, fields)
    return _compared(row[columns[there]], {**fields, "expected": np.array(fields["expected"])[there]})


def _hidden_slice(gemma: Gemma, figure: Figure) -> Measured:
    """Some components of a tensor at one position, by default after the final norm."""
    fields, seen = figure.fields, {}
    ids, name = ids_up_to(gemma, fields), fields.get("at", "final_norm")

    def tap(at: str, value: Array) -> Array:
        if at == name:
            seen[name] = value[0, -1]
        return value

    for _ in rows(gemma, ids, len(ids) - 1, tap=tap):
        pass
    if name not in seen:
        raise InputError(f"the model has no tensor {name!r}")
    return _compared(seen[name][fields["columns"]], fields)


def _token_logprob(gemma: Gemma, figure: Figure) -> Measured:
    """Natural log-probability of each id from `first` on, or of those that follow the text."""
    fields = figure.fields
    ids = [*ids_of(gemma, fields), *fields.get("following", [])]
    first = fields["first"] if "first" in fields else len(ids) - len(fields["following"])
    return _compared(logprobs_of(gemma, ids, first), fields)


def _cross_entropy(gemma: Gemma, figure: Figure) -> Measured:
    """Bits per byte of a text, log2(V) standing for the first id."""
    fields = figure.fields
    ids = ids_of(gemma, fields)
    nats = math.log(gemma.config.vocab_size)
    nats -= np.maximum(logprobs_of(gemma, ids, 1, final_cap=fields.get("final_cap")), -64).sum()
    bits = float(nats / math.log(2) / len(text_of(fields).encode("utf-8")))
    if "less_than" not in fields:
        return _compared(bits, fields)
    problem = None if bits < fields["less_than"] else f"{bits:.4f} is not below {fields['less_than']}"
    return Measured(f"< {fields['less_than']}", f"{bits:.4f}", "an upper bound", problem, [bits])


def _topk_prob(gemma: Gemma, figure: Figure) -> Measured:
    """Probabilities of single pieces, by default at the last position."""
    fields = figure.fields
    if fields.get("uncapped"):
        raise InputError("it is of logits before the final cap, which Gemma 1 has not")
    ids = [_single(gemma, piece) for piece in fields["pieces"]]
    return _compared(probs_of(gemma, fields)[ids], fields)


def _entropy(gemma: Gemma, figure: Figure) -> Measured:
    """Entropy of the next token, in bits."""
    probs = probs_of(gemma, figure.fields)
    probs = probs[probs > 0]
    return _compared(-float(probs @ np.log2(probs)), figure.fields)


def _greedy_text(gemma: Gemma, figure: Figure) -> Measured:
    """One of the continuations is ours: each token our best, or so close to it that the engine's rounding decided."""
    fields = figure.fields
    prompt = ids_of(gemma, fields)
    allowed = NEAR_TIE.get(figure.computed_in, max(NEAR_TIE.values()))
    found: list[tuple[int, str, str]] = []
    for text in fields["continuations"]:
        ids = gemma.tokenizer.encode(text, control="markers") if isinstance(text, str) else text
        agreeing, parting = _agreeing(gemma, prompt, ids, allowed)
        found.append((agreeing, f"{agreeing} of {len(ids)} tokens", parting))
    best = max(found)
    shown = fields["continuations"][found.index(best)]
    shown = shown if isinstance(shown, str) else gemma.tokenizer.decode(shown)
    problems = [problem for *_, problem in found]
    problem = "; ".join(problems) if all(problems) else None
    return Measured(_short(shown), best[1], f"best, or {allowed:g} below", problem, best[1])


def _reply_contains(gemma: Gemma, figure: Figure) -> Measured:
    """A string occurs in the greedy continuation of a bare question."""
    fields = figure.fields
    reply = gemma.generate(fields["text"], raw=True, temperature=0.0, max_tokens=fields["max_tokens"]).text
    wanted = fields["expected"]
    problem = None if wanted in reply else f"{wanted!r} is not in the reply {reply!r:.60}"
    return Measured(wanted, _short(reply), "occurs in it", problem, reply)


MEASURES: Mapping[str, Callable[[Gemma, Figure], Measured]] = {
    measure.__name__[1:]: measure
    for measure in (
        _logit_mean,
        _logits_slice,
        _hidden_slice,
        _token_logprob,
        _cross_entropy,
        _topk_prob,
        _entropy,
        _greedy_text,
        _reply_contains,
    )
}


def _single(gemma: Gemma, piece: str) -> int:
    ids = gemma.tokenizer.encode(piece, control="all")
    if len(ids) != 1:
        raise InputError(f"{piece!r} is {len(ids)} pieces of this vocabulary: expected one")
    return ids[0]


def _agreeing(gemma: Gemma, prompt: list[int], ids: list[int], allowed: float) -> tuple[int, str]:
    """Leading tokens that are our best or nearly so, and what happens then; empty if nothing does."""
    at = 0
    for part in rows(gemma, [*prompt, *ids][:-1], len(prompt) - 1):
        wanted = np.array(ids[at : at + len(part)])
        behind = part.max(axis=-1) - part[np.arange(len(wanted)), wanted]
        wrong = np.flatnonzero(~(behind <= allowed))
        if wrong.size:
            n = int(wrong[0])
            ours, theirs = (gemma.tokenizer.decode([int(i)]) for i in (part[n].argmax(), wanted[n]))
            words = f"{at + n} leading tokens of {len(ids)} agree"
            return at + n, f"{words}, then {theirs!r} is {behind[n]:.3g} behind our {ours!r}"
        at += len(part)
    return at, ""


def _compared(ours: ArrayLike, fields: Mapping[str, Any]) -> Measured:
    """Numbers against the published ones: each within atol + rtol * |published|."""
    want, got = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (fields["expected"], ours))
    atol, rtol = fields["atol"], fields.get("rtol", 0)
    tolerance = f"± {atol:g}" + (f" and {rtol:.2g} of it" if rtol else "")
    if got.shape != want.shape:
        problem = f"{got.size} numbers, {want.size} published: the text may be tokenised differently"
        return Measured(f"{want.size} numbers", f"{got.size} numbers", tolerance, problem, got.tolist())
    allowed = atol + rtol * np.abs(want)
    excess = np.abs(got - want) / np.maximum(allowed, np.finfo(np.float64).tiny)
    worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
    which = f" (no. {worst + 1} of {want.size})" if want.size > 1 else ""
    words: str | None = None
    if not np.all(excess <= 1):
        words = f"{got[worst]:.6g} is {abs(got[worst] - want[worst]):.3g} from {want[worst]:.6g}{which}"
        words += f", tolerance {allowed[worst]:.3g}; {np.count_nonzero(~(excess <= 1))} of {want.size} are off"
    return Measured(f"{want[worst]:.6g}{which}", f"{got[worst]:.6g}", tolerance, words, got.tolist())


def _short(text: str) -> str:
    """Beginning of a text, on one line."""
    return repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")
