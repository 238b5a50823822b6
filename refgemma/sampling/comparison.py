"""The same logits and settings through several engines side by side, and the step at which they part."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from refgemma.errors import InputError, listed
from refgemma.numerics import Array
from refgemma.sampling.engines import ENGINES, Refused, distribution, find
from refgemma.sampling.engines.engine import Distribution, LogitsDtype, State
from refgemma.sampling.params import SamplingParams

ROWS = 12  # tokens that the table shows
_LONG = 1e6  # from here on a logit is written with an exponent
UNIT = 2.0**-24  # half a unit in the last place of a float32, relatively


@dataclass(frozen=True)
class Parting:
    """The first difference between two engines that is more than rounding."""

    engines: tuple[str, str]  # the two names
    step: str  # the step at which they part
    rules: tuple[str, str]  # what each does there; says so where an engine has no such step
    orders: tuple[tuple[str, ...], tuple[str, ...]]  # the steps that each takes
    # ids that only the first keeps in the end, and that only the second keeps; the most likely first
    kept_by_one: tuple[tuple[int, ...], tuple[int, ...]]
    note: str  # for top-p, the mass that decided; where tokens tie, that they do

    def __str__(self) -> str:
        lines = [f"{self.engines[0]} and {self.engines[1]} part at {self.step}."]
        for engine, rule, order in zip(self.engines, self.rules, self.orders, strict=True):
            lines.append(f"  {engine}: {rule}. Its order: {', '.join(order) or 'no steps'}.")
        for engine, ids in zip(self.engines, self.kept_by_one, strict=True):
            if ids:
                lines.append(f"  In the end only {engine} keeps {listed(list(map(str, ids)), 5, str)}.")
        return "\n".join([*lines, f"  {self.note}"] if self.note else lines)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What several engines would draw from, and where they part; prints as a table.

    Attributes
    ----------
    logits : ndarray of float, shape (V,)
        Scores of the model.
    params : SamplingParams
        The settings.
    distributions : dict of str to Distribution
        What each engine makes of them, but for those that refuse.
    refusals : dict of str to str
        Why the others refuse.
    partings : tuple of Parting
        Where each engine parts from the first, for those that do.
    """

    logits: Array
    params: SamplingParams
    distributions: dict[str, Distribution]
    refusals: dict[str, str]
    partings: tuple[Parting, ...]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join([*self._table(), *(f"{reason}." for reason in self.refusals.values()), *self._outcome()])

    def _table(self) -> list[str]:
        """What each engine makes of the tokens; nothing where all refuse."""
        if not self.distributions:
            return []
        names = list(self.distributions)
        shown = self._tokens()
        rows = [["token", "logit", *names]]
        for token in shown:
            rows.append([str(token), _number(float(self.logits[token])), *(self._cell(name, token) for name in names)])
        rows.append(["kept", "", *(f"{len(d.kept)} of {len(self.logits)}" for d in self.distributions.values())])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        if len(shown) < len(self.logits):
            lines.append(f"({len(self.logits) - len(shown)} more tokens)")
        return lines

    def _outcome(self) -> list[str]:
        """Where the engines part, or that they agree."""
        if not self.partings and len(self.distributions) > 1:
            return ["They agree: the same tokens, and the same probabilities but for rounding."]
        return list(map(str, self.partings))

    def _tokens(self) -> list[int]:
        """Tokens that get a row: the most likely, and the most likely of those on which the engines differ."""
        everyone = list(self.distributions.values())
        keepers = np.sum([np.isin(np.arange(len(self.logits)), d.kept) for d in everyone], axis=0)
        likely = np.max([d.probs for d in everyone], axis=0)
        order = np.lexsort((-self.logits, -likely))  # what all removed comes in the order of the logits
        disputed = [token for token in order if 0 < keepers[token] < len(everyone)][: ROWS // 2]
        others = [token for token in order if token not in disputed][: ROWS - len(disputed)]
        return [int(token) for token in order[np.isin(order, [*disputed, *others])]]

    def _cell(self, name: str, token: int) -> str:
        step = removed_at(self.distributions[name], token)
        return f"{self.distributions[name].probs[token]:.6f}" if step is None else f"out at {step}"


def compare(
    logits: Array,
    params: SamplingParams,
    engines: Sequence[str] = ("refgemma", "transformers"),
    prompt_tokens: Sequence[int] = (),
    output_tokens: Sequence[int] = (),
    *,
    logits_dtype: LogitsDtype | None = None,
) -> Comparison:
    """Take the same logits and settings through several engines.

    Parameters
    ----------
    logits : ndarray of float, shape (V,)
        Scores of the model; minus infinity for what may not be chosen.
    params : SamplingParams
        The settings. What is off there is off: an engine's own defaults do not act, except for the 64 tokens that the
        penalties of llama.cpp look back over.
    engines : sequence of str
        Two or more names of `engines.ENGINES`; the others are compared with the first.
    prompt_tokens, output_tokens : sequence of int
        What has been read and written so far, token ids in ``[0, V)``.
    logits_dtype : {"float32", "float16", "bfloat16"}, optional
        Format in which the model gave the logits, for engines that go on in it. By default that of the array, where it
        is float16, else float32; NumPy has no bfloat16, so that must be said.

    Returns
    -------
    Comparison
        The kept tokens, their probabilities, and the step at which each engine parts from the first.

    Raises
    ------
    ValueError
        If there are not two engines, or not the ones named, or the input is bad. An engine that refuses the settings
        raises nothing: the comparison says so.

    Examples
    --------
    >>> import numpy as np
    >>> params = SamplingParams(temperature=2.0, top_p=0.59)
    >>> compare(np.log([0.6, 0.3, 0.1]), params, ["transformers", "llama.cpp"])
    token    logit  transformers     llama.cpp
        0  -0.5108      0.585786      1.000000
        1  -1.2040      0.414214  out at top_p
        2  -2.3026  out at top_p  out at top_p
     kept                 2 of 3        1 of 3
    transformers and llama.cpp part at top_p.
      transformers: Remove ... at most 1 - p; the most likely one stays (top_p = 0.59). Its order: temperature, top_p.
      llama.cpp: Keep ... that of the last included, is at least p (top_p = 0.59). Its order: top_p, temperature.
      In the end only transformers keeps 1.
      The tokens more likely than 1 hold 0.4727339 with transformers, 0.6000000 with llama.cpp.
    """
    several = isinstance(engines, Iterable) and not isinstance(engines, str)
    names = [find(engine).name for engine in engines] if several else []
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"engines are {engines!r}: expected two or more of {', '.join(ENGINES)}, each once")
    distributions: dict[str, Distribution] = {}
    refusals: dict[str, str] = {}
    for name in names:
        try:
            distributions[name] = distribution(
                name, logits, params, prompt_tokens, output_tokens, logits_dtype=logits_dtype
            )
        except Refused as reason:
            refusals[name] = str(reason)
    first, *others = distributions.values() if distributions else [None]
    found = [parting(first, other) for other in others if first and other]
    return Comparison(np.asarray(logits), params, distributions, refusals, tuple(part for part in found if part))


def parting(first: Distribution, second: Distribution) -> Parting | None:
    """Step at which two engines part; None where they agree.

    States agree where the same tokens are left with the same probabilities, but for rounding. Of all pairs of a state
    of the first and a state of the second that agree, the one farthest on is the last point in common; what they do
    next is where they part. Where these are different steps, since the orders differ, it is the first step that removes
    a token which the other engine keeps in the end, or else that changes the odds of the tokens in common with one
    engine alone.
    """
    if agree(first.states[-1], second.states[-1]):
        return None
    pairs = [(i, j) for i in range(len(first.states)) for j in range(len(second.states))]
    far_first = sorted(pairs, key=lambda pair: (-sum(pair), pair))
    last = next((pair for pair in far_first if agree(first.states[pair[0]], second.states[pair[1]])), None)
    i, j = last or (-1, -1)  # where not even the input agrees, that is the step
    rest, other = first.states[i + 1 :], second.states[j + 1 :]
    if rest and other and rest[0].name == other[0].name:
        step = rest[0].name
    else:
        names = [state.name for state in [*rest, *other]]
        step = _remover(first, second, names) or _changer(first, second, names) or names[0]
    only = _kept_by(first, second), _kept_by(second, first)
    return Parting(
        engines=(first.engine, second.engine),
        step=step,
        rules=(_rule(first, step), _rule(second, step)),
        orders=(_order(first), _order(second)),
        kept_by_one=only,
        note=_note(first, second, step, only),
    )


def agree(a: State, b: State) -> bool:
    """Whether two states leave the same tokens with the same probabilities, but for rounding in float32.

    An absolute error of a logit is a relative error of its probability. A logit passes at most five roundings to
    float32 (the input, three penalties, the temperature), and in gemma.cpp loses three bits more, in each of two
    engines: 16 units of its size leave room. Its own and the mean error of all logits count, and the roundings of the
    softmax: the exponential, the division, and a sum of V numbers in pairs. Below the smallest float32 with all its
    digits, 2**-126, a probability is nothing.
    """
    if not np.array_equal(a.scores > -np.inf, b.scores > -np.inf):
        return False
    p, q = shares(a), shares(b)
    size = np.maximum(np.abs(a.logits), np.abs(b.logits), dtype=np.float64)
    size[p == 0] = 0  # a removed token, or one so unlikely that its size says nothing
    relative = 16 * (size + (p * size).sum()) + 2 * np.log2(len(p)) + 16
    return bool(np.all(np.abs(p - q) <= UNIT * relative * np.maximum(p, q) + 2.0**-126))


def shares(state: State) -> Array:
    """Probabilities of a state, in float64."""
    weights = state.weights.astype(np.float64)
    return np.asarray(weights / weights.sum())


def removed_at(distribution: Distribution, token: int) -> str | None:
    """Step that removed a token."""
    return next((state.name for state in distribution.states if state.scores[token] == -np.inf), None)


def _remover(a: Distribution, b: Distribution, names: list[str]) -> str | None:
    """First step, in the order of either, that removes a token which the other keeps in the end."""
    removers = {removed_at(a, token) for token in _kept_by(b, a)} | {removed_at(b, token) for token in _kept_by(a, b)}
    return next((name for name in names if name in removers), None)


def _changer(a: Distribution, b: Distribution, names: list[str]) -> str | None:
    """First step that changes the probabilities of the tokens that both keep in the end, but not with both."""
    both = np.intersect1d(a.kept, b.kept)
    return next((name for name in names if _changes(a, name, both) != _changes(b, name, both)), None)


def _changes(distribution: Distribution, name: str, ids: Array) -> bool:
    """Whether a step changes the probabilities of some tokens among themselves."""
    pairs = itertools.pairwise(distribution.states)
    return any(not agree(_part(before, ids), _part(after, ids)) for before, after in pairs if after.name == name)


def _note(a: Distribution, b: Distribution, step: str, only: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    """What decided on the most likely token that one keeps and the other does not."""
    before = [x.states[max(i - 1, 0)] for x in (a, b) for i, state in enumerate(x.states) if state.name == step]
    if len(before) < 2 or not any(only):
        return ""
    if all(only) and all(state.scores[only[0][0]] == state.scores[only[1][0]] for state in before):
        return f"Tokens {only[0][0]} and {only[1][0]} are equally likely: which of them stays is a matter of sorting."
    if step != "top_p":
        return ""
    token = (only[0] or only[1])[0]
    mass = [float(_mass(state)[state.scores > state.scores[token]].sum()) for state in before]
    return f"The tokens more likely than {token} hold {mass[0]:.7f} with {a.engine}, {mass[1]:.7f} with {b.engine}."


def _mass(state: State) -> Array:
    """Probabilities as top-p sees them: those of an engine that works on them are not divided by their sum."""
    return shares(state) if state.scores is state.logits else state.weights


def _part(state: State, ids: Array) -> State:
    return State(state.name, state.rule, state.logits[ids], state.scores[ids], state.weights[ids])


def _rule(distribution: Distribution, name: str) -> str:
    return next((state.rule for state in distribution.states if state.name == name), f"No step {name}")


def _order(distribution: Distribution) -> tuple[str, ...]:
    return tuple(state.name for state in distribution.states[1:])


def _kept_by(a: Distribution, b: Distribution) -> tuple[int, ...]:
    """Ids that only the first of the two keeps, the most likely first."""
    ids = np.setdiff1d(a.kept, b.kept)
    return tuple(ids[np.argsort(-a.probs[ids], kind="stable")].tolist())


def _number(logit: float) -> str:
    return f"{logit:.4f}" if abs(logit) < _LONG else f"{logit:.4g}"
