"""How near a decision was to another one: the smallest change of the logits after which another token is chosen.

The size of a change is the most that any one logit moves; each may move up or down on its own, as rounding moves it.
Every border that decides is tried: the two ends of the interval that u falls in, and each cut, with its last kept token
dropped, its first removed token let in, or the two swapped, and all later steps repeated on what is then left. Where
several tokens tie at a border, the extremes for the draw are tried: the highest ids stay, or the lowest, each with the
drawn token or without it.

Moving all tokens inside a border by +e and all others by -e moves the log-odds of the mass inside by 2 e / T, so the
size for a draw after no cut and no repetition penalty is exact, however large. All else is first order in the change:
slopes are those at the recorded logits, and the moves that two borders need are not combined, so where both must be
crossed the size is a lower bound. Cuts that let two tokens of different logits in or out at once are not tried. So
finding no near-tie is an estimate, not a proof that there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling import steps
from refgemma.sampling.decision import GREEDY_BELOW, Decision, draw
from refgemma.sampling.params import SamplingParams

# Largest relative error of one rounding: 24 and 8 significant bits.
UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8}

CUTS: dict[str, Callable[[Array, Any], Array]] = {
    "top_k": steps.top_k,
    "top_p": steps.top_p,
    "min_p": steps.min_p,
    "typical": steps.typical,
}


@dataclass(frozen=True)
class Flip:
    """The nearest other outcome."""

    size: float  # smallest change of the raw logits that gives it; infinite where none does
    step: str  # whose border it crosses, the farthest where there are several: a cut, or "draw"
    token: int | None  # which token is chosen then


def order_of(name: str, logits: Array) -> Array:
    """Numbers by which a cut ranks tokens: it keeps them from the highest down."""
    return -steps.distances(logits)[0] if name == "typical" else logits


def last_and_first(order: Array, stays: Array) -> tuple[int, int | None]:
    """Places on both sides of a cut: the last kept, of ties the highest id, and the first removed, if any is."""
    kept = np.flatnonzero(stays)
    last = int(kept[len(kept) - 1 - order[kept][::-1].argmin()])
    return last, None if len(kept) == len(order) else int(np.where(stays, -np.inf, order).argmax())


def rounding_of(flip: float, size: float) -> str | None:
    """Finest format of which one rounding, of logits of this size, can reach the flip."""
    return next((name for name, unit in UNITS.items() if flip <= unit * size), None)


def nearest_flip(logits: Array, params: SamplingParams, decision: Decision) -> Flip:
    """Find the smallest change of the raw logits after which another token is chosen than in this recorded decision."""
    greedy = params.temperature < GREEDY_BELOW
    slopes = np.broadcast_to(1.0 if greedy else 1 / params.temperature, logits.shape)  # d logit here / d raw logit
    for stage in decision.stages:
        if stage.name == "repetition_penalty":
            slopes = slopes.copy()
            slopes[stage.ids] *= stage.after / stage.before
        if stage.name not in CUTS:
            logits = stage.logits_after
    ids, values = steps.left(logits)
    slopes = slopes if len(ids) == len(slopes) else slopes[ids]
    if greedy:
        best = int(np.searchsorted(ids, decision.token))
        sizes = (values[best] - values) / (slopes[best] + slopes)
        sizes[best] = np.inf
        second = int(sizes.argmin())
        return Flip(float(sizes[second]), "draw", int(ids[second]) if len(ids) > 1 else None)
    settings = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p, "typical": params.typical_p}
    cuts = [(name, value) for name, value in settings.items() if value is not None]
    return _through_cuts(ids, values, slopes, cuts, decision, math.inf)


def _through_cuts(
    ids: Array, values: Array, slopes: Array, cuts: Sequence[tuple[str, float]], decision: Decision, limit: float
) -> Flip:
    """Nearest flip of a size below the limit, from these candidates on through the remaining cuts."""
    if not cuts:
        return _of_draw(ids, values, slopes, decision)
    (name, value), *rest = cuts
    if name == "top_k" and value + 1 < len(ids):  # tokens below the first removed play no part
        seen = np.flatnonzero(values >= values[steps.largest(values, int(value) + 1)].min())
        ids, values, slopes = ids[seen], values[seen], slopes[seen]
    best = Flip(limit, "", None)
    for nth, (size, stay) in enumerate(_outcomes(name, value, values, slopes, ids == decision.token)):
        if size < best.size:
            found = _through_cuts(ids[stay], values[stay], slopes[stay], rest, decision, best.size)
            if max(size, found.size) < best.size:
                # The first outcome is the cut as it is, and crosses nothing.
                best = found if found.size > size or nth == 0 else Flip(size, name, found.token)
    return best


def _of_draw(ids: Array, values: Array, slopes: Array, decision: Decision) -> Flip:
    weights = steps.exp_below(values)
    if np.array_equal(ids, decision.kept):
        place = int(np.searchsorted(ids, decision.token))
    else:
        place = draw(np.cumsum(weights), decision.u)
    if ids[place] != decision.token:
        return Flip(0.0, "draw", int(ids[place]))
    best = Flip(math.inf, "draw", None)
    for end in (place, place + 1):  # the interval goes from the mass of [0, place) to that of [0, place + 1)
        size = _change_of_mass(decision.u, weights, slopes, slice(end), slice(end, None))
        if size < best.size:
            beyond = np.flatnonzero(weights[:end])[-1] if end == place else end + np.flatnonzero(weights[end:])[0]
            best = Flip(size, "draw", int(ids[beyond]))
    return best


def _outcomes(name: str, value: float, values: Array, slopes: Array, drawn: Array) -> Iterator[tuple[float, Array]]:
    """Which tokens a cut keeps, then which it would keep one border further, each with the change that takes."""
    stay = CUTS[name](values, value) > -np.inf
    yield 0.0, stay
    order = order_of(name, values)
    last, first = last_and_first(order, stay)
    if name == "min_p":
        yield from _outcomes_of_min_p(value, values, slopes, stay, drawn, (last, first))
        return
    at_last = values == values[last]
    kept = int(np.count_nonzero(stay & at_last))
    weights = steps.exp_below(values)
    wanted = value * weights.sum()
    tied = first is not None and values[first] == values[last]
    if tied:
        yield from ((0.0, other) for other in _choices(stay, at_last, kept, drawn))
    if name != "top_k":
        for fewer in _choices(stay, at_last, kept - 1, drawn):
            if fewer.any():
                yield _change_of_mass(value, weights, slopes, fewer, ~fewer), fewer
        places = np.arange(len(values))
        fewer = stay & (places != last)
        if name == "typical" and fewer.any():  # the last two may swap, and differ in mass
            second, _ = last_and_first(order, fewer)
            if weights[other := stay & (places != second)].sum() >= wanted:
                yield _change_of_distances(values, slopes, second, last), other
    if first is None:
        return
    at_first = values == values[first]
    if name != "top_k":
        for more in _choices(stay, at_first, int(np.count_nonzero(stay & at_first)) + 1, drawn):
            yield _change_of_mass(value, weights, slopes, stay, ~stay), more
    if tied:
        return
    if name == "typical":
        gap = _change_of_distances(values, slopes, last, first)
    else:
        gap = float((values[last] - values[first]) / (slopes[last] + slopes[first]))
    for fewer in _choices(stay, at_last, kept - 1, drawn):
        for swapped in _choices(fewer, at_first, 1, drawn):
            if name != "top_k" and weights[swapped].sum() < wanted:  # not yet enough: the former last comes after
                swapped |= stay
            yield gap, swapped


def _outcomes_of_min_p(
    value: float, values: Array, slopes: Array, stay: Array, drawn: Array, edges: tuple[int, int | None]
) -> Iterator[tuple[float, Array]]:
    """The same for min-p, which compares each token with the most likely one, so that tied tokens need no swap."""
    top = int(values.argmax())
    over = values - values[top] - (math.log(value) if value else -math.inf)
    earlier = np.arange(len(values)) < (int(drawn.argmax()) if drawn.any() else 0)
    for edge in edges:
        if edge is None or edge == top:
            continue
        size = float(abs(over[edge]) / (slopes[edge] + slopes[top]))
        group = values == values[edge]
        for part in (group & drawn, group & earlier, group & ~earlier & ~drawn, group):
            changed = stay & ~part if stay[edge] else stay | part
            if part.any() and changed.any():
                yield size, changed


def _choices(stay: Array, tied: Array, count: int, drawn: Array) -> Iterator[Array]:
    """The same tokens with `count` of the tied: their lowest ids or highest, with the drawn token or without it."""
    places = np.flatnonzero(tied)
    tried = set()
    for pool in (places, places[~drawn[places]]):
        for chosen in (pool[:count], pool[max(len(pool) - count, 0) :]):
            if len(chosen) == count and (key := tuple(chosen.tolist())) not in tried:
                tried.add(key)
                changed = stay & ~tied
                changed[chosen] = True
                yield changed


def _change_of_mass(
    share: float, weights: Array, slopes: Array, inside: Array | slice, outside: Array | slice
) -> float:
    """Change that brings the mass inside to this share of all; measured in log-odds, where moves add up."""
    mass, rest = weights[inside].sum(), weights[outside].sum()
    if not (0 < share < 1 and mass > 0 and rest > 0):
        return math.inf
    with np.errstate(over="ignore"):  # infinite, where hardly any mass is on one side
        distance = abs(math.log(mass / rest) - math.log(share / (1 - share)))
        moved = weights * slopes
        return float(distance / (moved[inside].sum() / mass + moved[outside].sum() / rest))


def _change_of_distances(values: Array, slopes: Array, near: int, far: int) -> float:
    """Change that makes two tokens equally far from the entropy, which every logit moves.

    With s = -log(prob) - H, ``ds[i] = -dz[i] + sum_j prob[j] (1 + log(prob[j]) + H) dz[j]``; the distance is abs(s).
    """
    log_probs = values - values.max()
    log_probs -= math.log(np.exp(log_probs).sum())
    probs = np.exp(log_probs)
    entropy = -(probs * log_probs).sum()
    surplus = -log_probs - entropy
    sign_near, sign_far = np.sign(surplus[near]), np.sign(surplus[far])
    effect = (sign_far - sign_near) * probs * (1 + log_probs + entropy)
    effect[far] -= sign_far
    effect[near] += sign_near
    gap = abs(surplus[far]) - abs(surplus[near])
    return float(gap / (slopes * np.abs(effect)).sum()) if gap else 0.0  # equal already, and perhaps without effect
