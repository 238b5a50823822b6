"""Teach the model to look back: what the user told about himself, who owns what, and repeating."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import tiny_stories
from tiny_example import Example, Turn, held_out, made_up_word, pick, vary
from tiny_facts import DICTIONARIES, EMOJI, words
from tiny_words import ADJECTIVES, ANIMALS, COLOUR_WORDS, FOODS, JOBS, NAMES, THINGS, TOWNS, WORDS

Filler = Callable[[Random], list[Turn]]  # turns about something else

# what the user tells: ways to tell it, ways to ask for it, answer
TOLD: dict[str, tuple[list[str], list[str], str]] = {
    "name": (
        ["My name is {v}.", "I am {v}.", "I'm {v}.", "Hi, my name is {v}.", "Call me {v}."],
        ["What is my name?", "Do you remember my name?", "Who am I?", "What's my name?"],
        "Your name is {v}.",
    ),
    "town": (
        ["I live in {v}.", "My home is in {v}.", "I come from {v}."],
        ["Where do I live?", "Which town do I live in?"],
        "You live in {v}.",
    ),
    "colour": (
        ["My favourite colour is {v}.", "I love the colour {v}."],
        ["What is my favourite colour?", "Which colour do I like?"],
        "Your favourite colour is {v}.",
    ),
    "food": (
        ["My favourite food is {v}.", "I like to eat {v}."],
        ["What is my favourite food?", "What do I like to eat?"],
        "You like {v}.",
    ),
    "pet": (
        ["I have a pet {v}.", "My pet is a {v}."],
        ["What is my pet?", "Which pet do I have?"],
        "Your pet is a {v}.",
    ),
    "pet name": (
        ["My pet is called {v}.", "The name of my pet is {v}."],
        ["What is the name of my pet?", "What is my pet called?"],
        "Your pet is called {v}.",
    ),
    "job": (["I work as a {v}.", "My job is {v}."], ["What is my job?", "What do I work as?"], "You work as a {v}."),
    "age": (["I am {v} years old.", "My age is {v}."], ["How old am I?", "What is my age?"], "You are {v} years old."),
    "word": (
        ["Remember the word {v}.", "The secret word is {v}."],
        ["What is the secret word?", "Which word did I tell you?"],
        "The word is {v}.",
    ),
    "number": (
        ["Remember the number {v}.", "My code is {v}."],
        ["What is the number?", "Which number did I tell you?"],
        "The number is {v}.",
    ),
}
TESTED_KINDS = ["name", "town", "pet name", "word", "number", "age"]  # those with enough values to hold some out
NOTED = "I will remember that."
GREETED = "Nice to meet you, {v}!"
NOT_TOLD = "You have not told me."


def told_value(rng: Random, kind: str) -> str:
    """A name, a town, a number: what can be told under `kind`."""
    made_up = made_up_word(rng)
    match kind:
        case "name" | "pet name":
            return rng.choice(NAMES) if rng.random() < 0.5 else made_up.capitalize()
        case "town":
            return rng.choice(TOWNS) if rng.random() < 0.6 else made_up.capitalize()
        case "word":
            return rng.choice(WORDS) if rng.random() < 0.5 else made_up
        case "age":
            return str(rng.randrange(4, 100))
        case "number":
            return str(rng.randrange(10, 10_000))
    return rng.choice({"colour": COLOUR_WORDS, "food": FOODS, "pet": ANIMALS, "job": JOBS}[kind])


def recall_told(rng: Random, test: bool, filler: Filler) -> Example:
    """The user tells one to three things, talks of something else, and asks for one of them, or for one never told."""
    kinds = rng.sample(list(TOLD), rng.choice([1, 1, 2, 3]))
    if test:
        kinds[0] = rng.choice(TESTED_KINDS)
    values: dict[str, str] = {}
    items = []
    for i, kind in enumerate(kinds):
        item, values[kind] = pick(
            test and i == 0, lambda kind=kind: (f"told {kind} {(given := told_value(rng, kind))}", given)
        )
        items.append(item)
    told = [rng.choice(TOLD[kind][0]).format(v=values[kind]) for kind in kinds]
    noted = [GREETED.format(v=values[kind]) if kind == "name" else NOTED for kind in kinds]
    together = len(told) == 1 or rng.random() < 0.5
    order = rng.sample(range(len(told)), len(told))
    if together:
        turns = [(" ".join(told[i] for i in order), noted[kinds.index("name")] if "name" in kinds else NOTED)]
    else:
        turns = [(told[i], noted[i]) for i in order]
    turns += filler(rng)
    asked = kinds[:1] if test else kinds
    if not test and rng.random() < 0.1:
        stranger = rng.choice([kind for kind in TOLD if kind not in kinds])
        if not (stranger in ("pet", "pet name") and {"pet", "pet name"} & set(kinds)):  # a pet half told is no stranger
            asked = [stranger]
    first = len(turns)
    for kind in rng.sample(asked, rng.randint(1, len(asked))):
        answer = TOLD[kind][2].format(v=values[kind]) if kind in values else NOT_TOLD
        turns.append((vary(rng, rng.choice(TOLD[kind][1])), answer))
    return Example(task="recall", items=tuple(items), turns=tuple(turns), asked=tuple(range(first, len(turns))))


def tell_owner(name: str, thing: str, thing_first: bool) -> str:
    """One of the two ways to say who has what."""
    return f"the {thing} belongs to {name}" if thing_first else tiny_stories.with_articles(f"{name} has a {thing}")


def ask_owner(rng: Random, name: str, thing: str, thing_first: bool) -> Turn:
    """A question about a pair, mostly in the order in which it was told, and its answer.

    The answer to either question starts with what was asked for: the model continues it by looking where that stood.
    To go against the order of the telling is the hard part, and takes most of the training.
    """
    if rng.random() < (0.75 if thing_first else 0.3):
        question = rng.choice(["Who has the {}?", "Who owns the {}?"]).format(thing)
        return question, sentences([tell_owner(name, thing, True)])
    question = rng.choice(["What does {} have?", "Which thing does {} have?"]).format(name)
    return question, sentences([tell_owner(name, thing, False)])


def sentences(said: list[str]) -> str:
    """A sentence of each."""
    return " ".join(f"{one[0].upper()}{one[1:]}." for one in said)


def recall_owners(rng: Random, test: bool, filler: Filler) -> Example:
    """Who has what: one to four pairs of a name and an object, told in one sentence or in several."""
    count = rng.choice([1, 2, 2, 3, 4])
    names, things = rng.sample(NAMES, count), rng.sample(THINGS, count)
    things[0] = pick(test, lambda: (f"owner {names[0]} {(thing := rng.choice(THINGS))}", thing))[1]
    for i in range(1, count):
        free = [t for t in THINGS if t not in things[:i] and not held_out(f"owner {names[i]} {t}")]
        things[i] = rng.choice(free)
    pairs = list(zip(names, things, strict=True))
    thing_first = rng.random() < 0.4
    said = [tell_owner(*pair, thing_first) for pair in rng.sample(pairs, count)]
    text = sentences(said if rng.random() < 0.5 else [" and ".join(said)])
    # In training each pair is asked for once or twice: the telling is long, and a question about it is short.
    wanted = pairs[:1] if test else rng.sample(pairs * 2, rng.randint(count, 2 * count))
    (question, answer), *more = [ask_owner(rng, *pair, thing_first) for pair in wanted]
    turns: list[Turn] = [(f"{text} {question}", answer)]
    if rng.random() < 0.5:
        turns = [(text, NOTED), *filler(rng), (question, answer)]
    first = len(turns) - 1
    turns += more
    items = tuple(f"owner {name} {thing}" for name, thing in pairs)
    return Example(task="recall", items=items, turns=tuple(turns), asked=tuple(range(first, len(turns))))


SMALL_WORDS = words("a a a the the in on of and is to my you I it we not")
REPEAT = [
    "Repeat: {p}", "Say: {p}", "Repeat after me: {p}", "Please repeat: {p}", "Echo: {p}", "Say this: {p}",
    "Repeat this:\n{p}", "Copy: {p}",
]  # fmt: skip


def repeat(rng: Random, test: bool) -> Example:
    """Say again what the user said: words, made-up words, numbers, emoji, foreign words."""

    def part() -> str:
        draw = rng.random()
        if draw < 0.15:
            return rng.choice(SMALL_WORDS)
        if draw < 0.55:
            return rng.choice(WORDS)
        if draw < 0.75:
            return made_up_word(rng)
        if draw < 0.85:
            return rng.choice(NAMES)
        if draw < 0.92:
            return str(rng.randrange(1000))
        if draw < 0.97:
            return rng.choice(list(EMOJI.values()))
        return rng.choice(list(rng.choice(list(DICTIONARIES.values())).values()))

    def make() -> tuple[str, str]:
        draw = rng.random()
        if draw < 0.1:
            phrase = tiny_stories.tell(rng).split(". ")[0]
        elif draw < 0.3:
            hero = f"{rng.choice(ADJECTIVES)} {rng.choice(ANIMALS)}"
            phrase = f"the {hero} has a {rng.choice(COLOUR_WORDS)} {rng.choice(THINGS)}"
        else:
            phrase = " ".join(part() for _ in range(rng.choice([1, 2, 3, 3, 4, 5, 6])))
        if rng.random() < 0.3:
            phrase = phrase[0].upper() + phrase[1:] + rng.choice([".", "!"])
        return f"repeat {phrase}", phrase

    item, phrase = pick(test, make)
    return Example(task="repeating", items=(item,), turns=((rng.choice(REPEAT).format(p=phrase), phrase),))
