"""The same logits and settings through several engines, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from refgemma.errors import InputError
from refgemma.numerics import Array
from refgemma.sampling.engines import ENGINES, Distribution, LogitsDtype, Refused, distribution, find
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.parting import Parting, parting, removed_at

ROWS = 12  # tokens that the table shows
_LONG = 1e6  # from here on a logit is written with an exponent


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
        """Tokens worth a row: the most likely, and the most likely of those on which the engines differ."""
        everyone = list(self.distributions.values())
        keepers = np.sum([np.isin(np.arange(len(self.logits)), d.kept) for d in everyone], axis=0)
        likely = np.max([d.probs for d in everyone], axis=0)
        order = np.lexsort((-self.logits, -likely))  # what all removed is in the order in which the model had it
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
        The settings. What is off there is off: an engine's own defaults do not act, but for the 64 tokens that the
        penalties of llama.cpp look back over.
    engines : sequence of str
        Two or more names of `engines.ENGINES`; the others are held against the first.
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


def _number(logit: float) -> str:
    return f"{logit:.4f}" if abs(logit) < _LONG else f"{logit:.4g}"
