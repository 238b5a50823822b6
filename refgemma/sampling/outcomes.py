"""What a cut keeps, what it would keep one border further, and the change of the logits that takes it there."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from refgemma.numerics import Array
from refgemma.sampling.borders import CUTS, border, order_of
from refgemma.sampling.steps.selection import exp_below


def outcomes(name: str, value: float, values: Array, slopes: Array, drawn: Array) -> Iterator[tuple[float, Array]]:
    """What a cut keeps, then what it would keep one border further, each with the change that takes.

    values (n,), slopes (n,), drawn (n,).
    """
    stay = CUTS[name](values, value) > -np.inf
    yield 0.0, stay
    order = order_of(name, values)
    last, first = border(order, stay)
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
                yield change_to_reach(value, weights, slopes, before, ~before), before
        before = _with(stay, out=last)
        if name == "typical" and before.any():  # the last two may change places, and differ in mass
            second, _ = border(order, before)
            if weights[other := _with(stay, out=second)].sum() >= wanted:
                yield change_of_distances(values, slopes, second, last), other
    if first is None:
        return
    at_first = values == values[first]
    if name != "top_k":
        count = int(np.count_nonzero(stay & at_first)) + 1
        for more in _choices(stay, at_first, count, drawn):
            yield change_to_reach(value, weights, slopes, stay, ~stay), more
    if tied:
        return
    gap = (change_of_distances if name == "typical" else change_to_tie)(values, slopes, last, first)
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


def change_to_tie(values: Array, slopes: Array, above: int, below: int) -> float:
    """Change that makes two logits equal: one moves down, the other up. values, slopes (n,)."""
    return float((values[above] - values[below]) / (slopes[above] + slopes[below]))


def change_to_reach(
    share: float, weights: Array, slopes: Array, inside: Array | slice, outside: Array | slice
) -> float:
    """Change that brings the mass inside to this share of all; measured in log-odds, where moves add up.

    weights, slopes (n,), inside, outside (n,).
    """
    mass, rest = weights[inside].sum(), weights[outside].sum()
    if not (0 < share < 1 and mass > 0 and rest > 0):
        return math.inf
    distance = abs(math.log(mass / rest) - math.log(share / (1 - share)))
    moved = weights * slopes
    return float(distance / (moved[inside].sum() / mass + moved[outside].sum() / rest))


def change_of_distances(values: Array, slopes: Array, near: int, far: int) -> float:
    """Change that makes two tokens equally far from the entropy, of which every logit is a part.

    With s = -log(prob) - H, ``ds[i] = -dz[i] + sum_j prob[j] (1 + log(prob[j]) + H) dz[j]``; the distance is abs(s).

    values, slopes (n,).
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
