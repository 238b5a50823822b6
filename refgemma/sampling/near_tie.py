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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling.borders import CUTS, border, order_of
from refgemma.sampling.decision import GREEDY_BELOW, Decision, draw
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.steps.cuts import exp_below, left

# Largest relative error of one rounding: 24 and 8 significant bits.
UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Flip:
    """The nearest other outcome.

    Attributes
    ----------
    size : float
        Smallest change of the raw logits that gives it; infinite where none does.
    step : str
        Whose border is crossed then, the farthest where several are: a cut, or "draw".
    token : int or None
        Which token comes.
    """

    size: float
    step: str
    token: int | None


def nearest_flip(logits: Array, params: SamplingParams, decision: Decision) -> Flip:
    """Find the smallest change of the logits after which another token is chosen.

    Parameters
    ----------
    logits : ndarray of float64, shape (V,)
        Before all steps.
    params : SamplingParams
        The settings.
    decision : Decision
        What came of the two, with its stages.

    Returns
    -------
    Flip
        The outcome that is nearest.
    """
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
    """Tell whether a change is within one rounding of logits of this size.

    Parameters
    ----------
    flip : float
        Smallest change that gives another token.
    size : float
        Largest absolute logit that counts: that of a token without probability, such as a mask of -1e9, does not.

    Returns
    -------
    {"float32", "bfloat16"} or None
        The finest format whose rounding may have decided.
    """
    return next((name for name, unit in UNITS.items() if flip <= unit * size), None)


def _nearest(
    ids: Array, values: Array, slopes: Array, cuts: Sequence[tuple[str, float]], decision: Decision, limit: float
) -> Flip:
    """Smallest change below `limit` that gives another token, from these candidates on through what cuts remain."""
    if not cuts:
        return _flip_of_draw(ids, values, slopes, decision)
    (name, value), *rest = cuts
    best = Flip(limit, "", None)
    for nth, (size, stay) in enumerate(_outcomes(name, value, values, slopes, ids == decision.token)):
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
    place = draw(np.cumsum(weights), decision.u)
    if ids[place] != decision.token:
        return Flip(0.0, "draw", int(ids[place]))
    best = Flip(math.inf, "draw", None)
    for end in (place, place + 1):  # the interval goes from the mass of [0, place) to that of [0, place + 1)
        size = _to_reach(decision.u, weights, slopes, slice(end), slice(end, None))
        if size < best.size:
            beyond = np.flatnonzero(weights[:end])[-1] if end == place else end + np.flatnonzero(weights[end:])[0]
            best = Flip(size, "draw", int(ids[beyond]))
    return best


def _outcomes(name: str, value: float, values: Array, slopes: Array, drawn: Array) -> Iterator[tuple[float, Array]]:
    """What a cut keeps, and what it would keep one border further: the change that takes, and who stays."""
    stay = CUTS[name](values, value) > -np.inf
    yield 0.0, stay
    last, first = border(order_of(name, values), stay)
    if name == "min_p":
        yield from _outcomes_of_min_p(value, values, slopes, stay, drawn)
        return
    at_last = values == values[last]
    kept = int(np.count_nonzero(stay & at_last))
    weights = exp_below(values)
    wanted = value * weights.sum()
    tied = first is not None and values[first] == values[last]
    if tied:
        yield from ((0.0, other) for other in _choices(stay, at_last, kept, drawn))
    if name != "top_k":
        for before in _choices(stay, at_last, kept - 1, drawn):
            if before.any():
                yield _to_reach(value, weights, slopes, before, ~before), before
        before = _with(stay, out=last)
        if name == "typical" and before.any():  # the last two may change places, and differ in mass
            second, _ = border(order_of(name, values), before)
            if weights[other := _with(stay, out=second)].sum() >= wanted:
                yield _gap_of_distances(values, slopes, second, last), other
    if first is None:
        return
    at_first = values == values[first]
    if name != "top_k":
        count = int(np.count_nonzero(stay & at_first)) + 1
        for more in _choices(stay, at_first, count, drawn):
            yield _to_reach(value, weights, slopes, stay, ~stay), more
    if tied:
        return
    gap = (_gap_of_distances if name == "typical" else _gap)(values, slopes, last, first)
    for fewer in _choices(stay, at_last, kept - 1, drawn):
        for swapped in _choices(fewer, at_first, 1, drawn):
            if name != "top_k" and weights[swapped].sum() < wanted:  # not yet enough: the one that left comes after
                swapped |= stay
            yield gap, swapped


def _outcomes_of_min_p(
    value: float, values: Array, slopes: Array, stay: Array, drawn: Array
) -> Iterator[tuple[float, Array]]:
    """The same for a cut that measures each token against the most likely one, so that tied ones need no exchange."""
    top = int(values.argmax())
    last, first = border(values, stay)
    over = values - values[top] - (math.log(value) if value else -math.inf)
    earlier = np.arange(len(values)) < (int(drawn.argmax()) if drawn.any() else 0)
    for edge in (last, first):
        if edge is None or edge == top:
            continue
        size = float(abs(over[edge]) / (slopes[edge] + slopes[top]))
        group = values == values[edge]
        parts = [group & drawn, group & earlier, group & ~earlier & ~drawn, group]
        for part in (part for part in parts if part.any()):
            changed = stay & ~part if edge == last else stay | part
            if changed.any():
                yield size, changed


def _choices(stay: Array, tied: Array, count: int, drawn: Array) -> Iterator[Array]:
    """Who may stay where so many of the tied do: their lowest ids or highest, with the drawn token or without it."""
    rest = stay & ~tied
    places = np.flatnonzero(tied)
    others = places[~drawn[places]]
    tried = set()
    for pool in (places, others):
        for chosen in (pool[:count], pool[len(pool) - count :] if count <= len(pool) else pool[:0]):
            if len(chosen) == count and (key := tuple(chosen.tolist())) not in tried:
                tried.add(key)
                changed = rest.copy()
                changed[chosen] = True
                yield changed


def _with(stay: Array, *, out: int) -> Array:
    changed = stay.copy()
    changed[out] = False
    return changed


def _gap(values: Array, slopes: Array, above: int, below: int) -> float:
    """Change that makes two logits equal: one moves down, the other up."""
    return float((values[above] - values[below]) / (slopes[above] + slopes[below]))


def _to_reach(share: float, weights: Array, slopes: Array, inside: Array | slice, outside: Array | slice) -> float:
    """Change that brings the mass inside to this share of all; measured in log-odds, where moves add up."""
    mass, rest = weights[inside].sum(), weights[outside].sum()
    if not (0 < share < 1 and mass > 0 and rest > 0):
        return math.inf
    distance = abs(math.log(mass / rest) - math.log(share / (1 - share)))
    moved = weights * slopes
    return float(distance / (moved[inside].sum() / mass + moved[outside].sum() / rest))


def _gap_of_distances(values: Array, slopes: Array, near: int, far: int) -> float:
    """Change that makes two tokens equally far from the entropy, of which every logit is a part.

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
