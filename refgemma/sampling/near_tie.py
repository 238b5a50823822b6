"""How near a decision was to another one.

The size of a change of logits is the most that any one of them moves. Looked for is the smallest size with which
another token comes, where each logit may move up or down on its own, as rounding moves it. Every border that decides is
tried: each cut with the last kept and the first removed token swapped, the one dropped, or the other let in, all later
steps done again on what is then left, and the two ends of the interval that u falls in.

A move of all tokens inside a border by +e and of all others by -e moves the log-odds of the mass inside by 2 e / T, so
the size for a draw after no cut and no repetition penalty is exact, however large. All else is first order in the
change: slopes are those at the recorded logits, and the moves that two borders need are not set against each other, so
where both must be crossed the size is a bound from below. Cuts that let two tokens in or out at once are not tried.
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
        Largest absolute logit that counts.

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
    for size, stay in _outcomes(name, value, values, slopes):
        if size < best.size:
            found = _nearest(ids[stay], values[stay], slopes[stay], rest, decision, best.size)
            if max(size, found.size) < best.size:
                best = found if found.size >= size else Flip(size, name, found.token)
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


def _outcomes(name: str, value: float, values: Array, slopes: Array) -> Iterator[tuple[float, Array]]:
    """What a cut keeps, and what it would keep one border further: the change that takes, and who stays."""
    stay = CUTS[name](values, value) > -np.inf
    yield 0.0, stay
    last, first = border(order_of(name, values), stay)
    if name == "top_k":
        if first is not None:
            yield _gap(values, slopes, last, first), _with(stay, out=last, into=first)
        return
    if name == "min_p":
        top = int(values.argmax())
        over = values - values[top] - (math.log(value) if value else -math.inf)
        if last != top:
            yield over[last] / (slopes[last] + slopes[top]), _with(stay, out=last)
        if first is not None:
            yield -over[first] / (slopes[first] + slopes[top]), _with(stay, into=first)
        return
    weights = exp_below(values)
    wanted = value * weights.sum()
    before = _with(stay, out=last)
    if before.any():
        yield _to_reach(value, weights, slopes, before, ~before), before
        if name == "typical":  # the last two may change places, and differ in mass
            second, _ = border(order_of(name, values), before)
            if weights[other := _with(stay, out=second)].sum() >= wanted:
                yield _gap_of_distances(values, slopes, second, last), other
    if first is not None:
        yield _to_reach(value, weights, slopes, stay, ~stay), _with(stay, into=first)
        gap = _gap(values, slopes, last, first) if name == "top_p" else _gap_of_distances(values, slopes, last, first)
        swapped = _with(before, into=first)
        if weights[swapped].sum() < wanted:  # not yet enough: the last one comes after
            swapped[last] = True
        yield gap, swapped


def _with(stay: Array, *, out: int | None = None, into: int | None = None) -> Array:
    changed = stay.copy()
    if out is not None:
        changed[out] = False
    if into is not None:
        changed[into] = True
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
    return float((abs(surplus[far]) - abs(surplus[near])) / (slopes * np.abs(effect)).sum())
