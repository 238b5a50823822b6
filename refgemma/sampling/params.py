"""The settings that decide how tokens are chosen."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from refgemma.errors import InputError

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of one generation; by default no step but the temperature changes the logits.

    Attributes
    ----------
    temperature : float
        Divides the logits. Below 1e-5 the most likely token is taken, on ties the lowest id, and the steps after the
        temperature are left out.
    top_k : int or None
        Keep exactly this many tokens, the most likely; on ties the lower id.
    top_p : float or None
        Keep the most likely tokens while the mass before them is below this share; the first is always kept.
    repetition_penalty : float
        Divides positive logits, and multiplies negative ones, of every token in the prompt or the output.
    frequency_penalty : float
        Subtracted from a token's logit for each time it occurs in the output.
    presence_penalty : float
        Subtracted once from the logit of every token that occurs in the output.
    penalty_window : int or None
        The penalties look back over this many tokens: repetition over the last of prompt and output together, the two
        others over the last of the output. None looks back over all of them.
    min_p : float or None
        Keep tokens at least this many times as likely as the most likely one.
    typical_p : float or None
        Keep the tokens whose surprise is nearest to the entropy, while the mass before them is below this share.
    logit_bias : mapping of int to float
        Added to the logits of these tokens, before all other steps; kept as pairs, ids ascending.
    banned : iterable of int
        Tokens that may not be chosen; kept as a tuple, ids ascending.
    seed : int or None
        Decides the draws, 0 to 2**64 - 1; with None a seed is drawn, and the result reports it.
    max_tokens : int
        Longest output, in tokens.
    stop : str or tuple of str
        Texts that end the output; they are not part of it.
    """

    temperature: float = 0.6
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    banned: Iterable[int] = ()
    seed: int | None = None
    max_tokens: int = 256
    stop: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        settle = functools.partial(object.__setattr__, self)  # frozen, but NumPy's scalars become plain numbers
        settle("temperature", _number("temperature", self.temperature, low=0))
        settle("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, low=0))
        if self.repetition_penalty == 0:
            raise InputError(
                "repetition_penalty is 0: expected a number above 0 (1 is off), since logits are divided by it"
            )
        settle("frequency_penalty", _number("frequency_penalty", self.frequency_penalty))
        settle("presence_penalty", _number("presence_penalty", self.presence_penalty))
        for name in ("top_p", "min_p", "typical_p"):
            if getattr(self, name) is not None:
                settle(name, _number(name, getattr(self, name), low=0, high=1))
        for name in ("top_k", "penalty_window"):
            if getattr(self, name) is not None:
                settle(name, _whole(name, getattr(self, name), low=1, hint=" (None is off)"))
        if not isinstance(self.logit_bias, tuple) or self.logit_bias:
            settle("logit_bias", _biases(self.logit_bias))
        if not isinstance(self.banned, tuple) or self.banned:
            settle("banned", _ids("banned", self.banned))
        if self.seed is not None:
            settle("seed", _whole("seed", self.seed, low=0, high=MAX_SEED))
        settle("max_tokens", _whole("max_tokens", self.max_tokens, low=1))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop is {self.stop!r}: expected a text or a list of texts, none of them empty")
        settle("stop", tuple(stop))


def _number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    except OverflowError:  # a whole number beyond float64
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name} is {value!r}: expected a finite number")
    if not low <= number <= high:
        wanted = f"between {low:g} and {high:g}" if high < math.inf else f"of at least {low:g}"
        raise InputError(f"{name} is {value!r}: expected a number {wanted}")
    return number


def _whole(name: str, value: object, low: int, high: int | None = None, hint: str = "") -> int:
    number = None if isinstance(value, bool) or not isinstance(value, numbers.Integral) else int(value)
    if number is None or number < low or (high is not None and number > high):
        wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name} is {value!r}: expected a whole number {wanted}{hint}")
    return number


def _ids(name: str, values: object) -> tuple[int, ...]:
    """Token ids, ascending, each once; the size of the vocabulary is not known here."""
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, Mapping)):
        raise InputError(f"{name} is {values!r:.60}: expected a list of token ids")
    return tuple(sorted({_whole(f"a token id of {name}", value, low=0) for value in values}))


def _biases(given: object) -> tuple[tuple[int, float], ...]:
    """Pairs of id and bias, which compare, hash and copy as the settings do."""
    pairs = tuple(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, (tuple, list)) or not all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs
    ):
        raise InputError(f"logit_bias is {given!r:.60}: expected a mapping from token ids to numbers")
    ids = _ids("logit_bias", [token for token, _ in pairs])
    if len(ids) < len(pairs):
        raise InputError(f"logit_bias is {given!r:.60}: expected every token id once")
    biases = {int(token): _number(f"the bias of token {token}", bias) for token, bias in pairs}
    return tuple((token, biases[token]) for token in ids)
