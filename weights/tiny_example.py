"""One example of a task, and the rule that keeps the test apart from the training text.

An example carries the *items* it teaches: an operand pair, a word, a fact in one phrasing, a name-object pair, a tool
call. An item is held out if ``sha256(item) % 10 == 0``. Training examples hold no such item; a test example is made
of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tiny_facts import words

Turn = tuple[str, str]  # what the user says, what the model is to answer


@dataclass(frozen=True, kw_only=True)
class Example:
    """A piece of conversation; the test asks the turns numbered in `asked`, with the right answers before each."""

    task: str
    items: tuple[str, ...]
    turns: tuple[Turn, ...]
    asked: tuple[int, ...] = (-1,)


def held_out(item: str) -> bool:
    """Whether an item belongs to the test, by a hash that no seed can move."""
    return int(hashlib.sha256(item.encode()).hexdigest(), 16) % 10 == 0


def pick(test: bool, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Draw until the first entry, the item, is on the wanted side of the split."""
    while True:
        drawn = make()
        if held_out(drawn[0]) == test:
            return drawn


def vary(rng: Random, text: str) -> str:
    """What people do to a question: drop its last mark, or its first capital."""
    if rng.random() < 0.1:
        text = text.rstrip("?.!")
    return text[:1].lower() + text[1:] if rng.random() < 0.1 else text


ONSETS = words(
    """b bl br c ch cl cr d dr f fl fr g gl gr h j k kn l m n p ph pl pr qu r s sc sh sk sl sm sn sp st str sw t th tr
    tw v w wh y z"""
)
VOWELS = words("a a a e e e i i o o u u ai ea ee ie oa oo ou y au")
CODAS = words("_ _ _ _ b ck d f g k l ll m mp n nd ng nt p r rd rk rn rt s sh sk ss st t th tle w x y ge ce ve")


def made_up_word(rng: Random) -> str:
    """A word that sounds English and is none, so that spelling and copying are learned and not remembered."""
    parts = []
    for _ in range(rng.choice([1, 2, 2, 2, 3])):
        parts += [rng.choice(ONSETS), rng.choice(VOWELS), rng.choice(CODAS).replace("_", "")]
    return "".join(parts)[:11]
