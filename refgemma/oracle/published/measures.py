"""What a model computes for a published figure, one function per kind, and how far that is from what was published.

Logits of a text are computed some rows at a time, so that no text fills memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from refgemma.cache import KVCache
from refgemma.errors import InputError
from refgemma.gemma import Gemma
from refgemma.generation import CHUNK
from refgemma.model import Tap, forward, identity
from refgemma.numerics import Array, namespace_of, to_host
from refgemma.oracle.published.figures import Figure, read_json

_LONGEST = 28  # letters of a text that are shown
_ROWS = 64  # positions whose logits are held at once: 131 MB in float64 at V = 256,000

# How far below the model's best logit a published token may be, by the format its engine computed in. bfloat16 is
# spaced by 0.125 to 0.25 for logits of 16 to 64, two of them are compared, and the layers before add as much again:
# five runs of one request differ by 0.1. float16 is 8 times finer; float32 leaves the order of summation, over 18
# layers.
NEAR_TIE = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.5, "8-bit weights": 0.5, "unknown": 0.5}


@dataclass(frozen=True)
class Measured:
    """What a model computes, beside what was published."""

    # both in short: of several numbers the pair that is farthest apart, relative to the tolerance
    published: str
    computed: str
    tolerance: str  # how far they may be apart
    problem: str | None  # what is wrong, in a sentence; None if nothing is
    values: list[float] | str  # all that the model computes


def measure(gemma: Gemma, figure: Figure) -> Measured:
    """Compute a figure."""
    if figure.kind not in MEASURES:
        raise InputError(f"unknown kind of figure {figure.kind!r}: expected one of {', '.join(MEASURES)}")
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
    """Bits per byte of a text, with log2(V) for the first id."""
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
        raise InputError("it is about logits before the final cap, and Gemma 1 has no cap")
    ids = [_single(gemma, piece) for piece in fields["pieces"]]
    return _compared(probs_of(gemma, fields)[ids], fields)


def _entropy(gemma: Gemma, figure: Figure) -> Measured:
    """Entropy of the next token, in bits."""
    probs = probs_of(gemma, figure.fields)
    probs = probs[probs > 0]
    return _compared(-float(probs @ np.log2(probs)), figure.fields)


def _greedy_text(gemma: Gemma, figure: Figure) -> Measured:
    """Whether one of the continuations is the model's: each token its best, or so close that rounding decided."""
    fields = figure.fields
    prompt = ids_of(gemma, fields)
    allowed = NEAR_TIE.get(figure.computed_in, max(NEAR_TIE.values()))
    found: list[tuple[int, str, str]] = []
    for text in fields["continuations"]:
        ids = gemma.tokenizer.encode(text, control="markers") if isinstance(text, str) else text
        agreeing, difference = _agreeing(gemma, prompt, ids, allowed)
        found.append((agreeing, f"{agreeing} of {len(ids)} tokens", difference))
    best = max(found)
    shown = fields["continuations"][found.index(best)]
    shown = shown if isinstance(shown, str) else gemma.tokenizer.decode(shown)
    differences = [difference for *_, difference in found]
    problem = "; ".join(differences) if all(differences) else None
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
    """Count the leading tokens that are the model's best or nearly so, and say how the next one differs."""
    at = 0
    for part in rows(gemma, [*prompt, *ids][:-1], len(prompt) - 1):
        wanted = np.array(ids[at : at + len(part)])
        behind = part.max(axis=-1) - part[np.arange(len(wanted)), wanted]
        wrong = np.flatnonzero(~(behind <= allowed))
        if wrong.size:
            n = int(wrong[0])
            best, other = (gemma.tokenizer.decode([int(i)]) for i in (part[n].argmax(), wanted[n]))
            words = f"{at + n} leading tokens of {len(ids)} agree"
            return at + n, f"{words}, then {other!r} is {behind[n]:.3g} behind the model's {best!r}"
        at += len(part)
    return at, ""


def _compared(computed: ArrayLike, fields: Mapping[str, Any]) -> Measured:
    """Compare numbers with the published ones: each within atol + rtol * |published|."""
    want, got = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (fields["expected"], computed))
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


# ---- logits of texts


def rows(gemma: Gemma, ids: list[int], first: int = 0, *, tap: Tap = identity) -> Iterator[Array]:
    """Logits from a position on, some rows at a time."""
    if not 0 < len(ids) <= gemma.config.max_positions:
        raise InputError(f"it takes {len(ids)} tokens: the model reads 1 to {gemma.config.max_positions}")
    xp = namespace_of(gemma.params["final_norm"])
    cache = KVCache(gemma.config, batch=1, capacity=len(ids), dtype=gemma.numerics.dtype, xp=xp)
    tokens, start = np.array([ids]), 0
    while start < len(ids):
        before = start < first
        stop = min(start + (CHUNK if before else _ROWS), first if before else len(ids))
        with np.errstate(invalid="ignore", over="ignore"):  # damaged weights overflow; the result is still judged
            scores = forward(
                gemma.params,
                gemma.config,
                tokens[:, start:stop],
                cache=cache,
                logits="last" if before else "all",
                numerics=gemma.numerics,
                tap=tap,
            )
        if not before:
            yield to_host(scores[0]).astype(np.float64)
        start = stop


def logprobs_of(gemma: Gemma, ids: list[int], first: int, *, final_cap: float | None = None) -> Array:
    """Natural log-probabilities of some tokens, each given all before it."""
    logprobs, at = [], first
    for part in rows(gemma, ids[:-1], first - 1):
        logits = part if final_cap is None else final_cap * np.tanh(part / final_cap)
        following = np.array(ids[at : at + len(logits)])
        logprobs.append(logits[np.arange(len(following)), following] - _log_sum(logits))
        at += len(following)
    return np.concatenate(logprobs)


def text_of(fields: Mapping[str, Any]) -> str:
    """The text of a figure."""
    if "text_ref" in fields:
        text: str = read_json("texts.json")["texts"][fields["text_ref"]]
        return text
    given = fields["text"]
    return given if isinstance(given, str) else given["repeat"] * given["times"] + given["then"]


def ids_of(gemma: Gemma, fields: Mapping[str, Any]) -> list[int]:
    """The token ids of a figure."""
    if "ids" in fields:
        ids: list[int] = fields["ids"]
        return ids
    if fields.get("chat"):
        return gemma.encode_prompt(text_of(fields))
    return gemma.tokenizer.encode(
        text_of(fields), bos=fields.get("bos", True), control="markers"
    )  # markup tags are tokens here


def ids_up_to(gemma: Gemma, fields: Mapping[str, Any]) -> list[int]:
    """Token ids up to the position of a figure, by default the last."""
    ids = ids_of(gemma, fields)
    position = fields.get("position", len(ids) - 1)
    if not 0 <= position < len(ids):
        raise InputError(f"position {position} is outside the {len(ids)} tokens: the text may be tokenised differently")
    return ids[: position + 1]


def row_of(gemma: Gemma, fields: Mapping[str, Any]) -> Array:
    """Logits at the position of a figure, by default the last."""
    ids = ids_up_to(gemma, fields)
    *_, last = rows(gemma, ids, len(ids) - 1)
    row: Array = last[-1]
    return row


def probs_of(gemma: Gemma, fields: Mapping[str, Any]) -> Array:
    """Probabilities at the position of a figure."""
    temperature = fields.get("temperature", 1.0)
    if not temperature > 0:
        raise InputError(f"temperature is {temperature!r}: expected a number above 0")
    scaled = row_of(gemma, fields) / temperature
    probs: Array = np.exp(scaled - _log_sum(scaled))
    return probs


def _log_sum(logits: Array) -> Array:
    """Log of the sum of exponentials along the last axis."""
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        top = logits.max(axis=-1)
        total: Array = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
    return total
