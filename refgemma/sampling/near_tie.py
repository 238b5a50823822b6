"""How near a decision was to another one.

The size of a change of logits is the most that any one of them moves. Looked for is the smallest size with which
another token comes, where each logit may move up or down on its own, as rounding moves it. Every border that decides is
tried: each cut with the last kept and the first removed token swapped, the one dropped, or the other let in, all later
steps done again on what is then left, and the two ends of the interval that u falls in. Where several tokens tie at a
border, any of them may be the one; those tried are the extremes for the draw: the highest ids stay, or the lowest, each
with the drawn token or without it.

A move of all tokens inside a border by +e and of all others by -e moves the log-odds of the mass inside by 2 e / T, so
the size for a draw after no cut and no repetition penalty is exact, however large. All else is first order in the
change: slopes are those at the recorded logits, and the moves that two borders need are not set against each other, so
where both must be crossed the size is a bound from below. Cuts that let two tokens of unlike logits in or out at once
are not tried. So that no near-tie was found is an estimate, and no proof that there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling.borders import CUTS
from refgemma.sampling.decision import GREEDY_BELOW, Decision, draw
from refgemma.sampling.outcomes import change_to_reach, outcomes
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps.selection import exp_below, largest, left

# Largest relative error of one rounding: 24 and 8 significant bits.
UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Flip:
    """The nearest other outcome."""

    size: float  # smallest change of the raw logits that gives it; infinite where none does
    step: str  # whose border is crossed then, the farthest where several are: a cut, or "draw"
    token: int | None  # which token comes


def nearest_flip(logits: Array, params: SamplingParams, decision: Decision) -> Flip:
    """Find the smallest change of the logits after which another token is chosen. logits (V,)."""
    greedy = params.temperature < GREEDY_BELOW
    slopes = np.broadcast_to(1.0 if greedy else 1 / params.temperature, logits.shape)  # d logit here / d raw logit
    for stage in decision.stages:
        if stage.name == "repetition_penalty":
            slopes = slopes.copy()
            slopes[stage.ids] *= stage.after / stage.before
        if stage.name not in CUTS:
            logits = stage.logits_after
    ids, values = left(logits)
    slopes = slopes if len(ids) == len(slopes) else slopes[ids]
    if greedy:
        return _flip_of_greedy(ids, values, slopes, decision.token)
    settings = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p, "typical": params.typical_p}
    cuts = [(name, value) for name, value in settings.items() if value is not None]
    return _nearest(ids, values, slopes, cuts, decision, math.inf)


def kind_of_near_tie(flip: float, size: float) -> str | None:
    """Tell whether a change is within one rounding of logits of this size."""
    return next((name for name, unit in UNITS.items() if flip <= unit * size), None)


def _nearest(
    ids: Array, values: Array, slopes: Array, cuts: Sequence[tuple[str, float]], decision: Decision, limit: float
) -> Flip:
    """Smallest change below `limit` that gives another token, from these candidates on through what cuts remain."""
    if not cuts:
        return _flip_of_draw(ids, values, slopes, decision)
    (name, value), *rest = cuts
    if name == "top_k" and value + 1 < len(ids):  # tokens below the first removed have no part in it
        seen = np.flatnonzero(values >= values[largest(values, int(value) + 1)].min())
        ids, values, slopes = ids[seen], values[seen], slopes[seen]
    best = Flip(limit, "", None)
    for nth, (size, stay) in enumerate(outcomes(name, value, values, slopes, ids == decision.token)):
        if size < best.size:
            found = _nearest(ids[stay], values[stay], slopes[stay], rest, decision, best.size)
            if max(size, found.size) < best.size:
                # The first outcome is the cut as it is, and crosses nothing.
                best = found if found.size > size or nth == 0 else Flip(size, name, found.token)
    return best


def _flip_of_greedy(ids: Array, values: Array, slopes: Array, token: int) -> Flip:
    first = int(np.searchsorted(ids, token))
    sizes = (values[first] - values) / (slopes[first] + slopes)
    sizes[first] = np.inf
    second = int(sizes.argmin())
    return Flip(float(sizes[second]), "draw", int(ids[second]) if len(ids) > 1 else None)


def _flip_of_draw(ids: Array, values: Array, slopes: Array, decision: Decision) -> Flip:
    weights = exp_below(values)
    if np.array_equal(ids, decision.kept):
        place = int(np.searchsorted(ids, decision.token))
    else:
        place = draw(np.cumsum(weights), decision.u)
    if ids[place] != decision.token:
        return Flip(0.0, "draw", int(ids[place]))
    best = Flip(math.inf, "draw", None)
    for end in (place, place + 1):  # the interval goes from the mass of [0, place) to that of [0, place + 1)
        size = change_to_reach(decision.u, weights, slopes, slice(end), slice(end, None))
        if size < best.size:
            beyond = np.flatnonzero(weights[:end])[-1] if end == place else end + np.flatnonzero(weights[end:])[0]
            best = Flip(size, "draw", int(ids[beyond]))
    return best
