"""Short stories from a grammar: many equally likely continuations, so that a sampler's settings can be seen to matter.

A story has a hero, a home, a wish, a trouble, a helper and an end. The hero's kind may be asked for; all else is drawn.
"""

from __future__ import annotations

import re
from random import Random

from tiny_facts import words
from tiny_words import ADJECTIVES, ANIMALS, COLOUR_WORDS, FOODS, JOBS, NAMES, PLACES, THINGS

OPENINGS = [
    "Once upon a time there was a {adj} {hero} named {name}.",
    "Once upon a time, a {adj} {hero} called {name} lived {place}.",
    "Long ago, {place}, there lived a {adj} {hero} named {name}.",
    "There once was a {hero} named {name} who was very {adj}.",
    "{Place} lived a {adj} {hero}. The name of the {hero} was {name}.", "This is the story of {name}, a {adj} {hero}.",
    "Once upon a time a {hero} and a {friend} lived {place}. The {hero} was called {name}.",
    "Everybody {place} knew {name}, the {adj} {hero}.",
]  # fmt: skip
HABITS = [
    "Every {time} {name} went to the {spot} to look for {food}.", "{name} loved {food} more than anything.",
    "All day long {name} sang songs about {food}.", "{name} had a {colour} {thing} and was very proud of it.",
    "{name} lived alone and often felt {mood}.", "The best friend of {name} was a {adj2} {friend}.", "",  "",
]  # fmt: skip
TROUBLES = [
    "One {time} the {colour} {thing} was gone.", "One {time} {name} lost a {colour} {thing} near the {spot}.",
    "But one {time} a {adj2} {friend} took all the {food}.", "Then a storm came and broke the {thing}.",
    "One {time} {name} found a {colour} {thing} near the {spot}.",
    "One cold {time} {name} met a {adj2} {friend} who was lost.",
    "One {time} there was nothing left to eat, and {name} was hungry.", "One {time} {name} wanted to see the {spot2}.",
    "One {time} a {job} came by and asked for some {food}.", "But the way to the {spot2} was long and dark.",
]  # fmt: skip
SPEECH = [
    '"What shall I do?" said {name}.', '"Oh no!" cried {name}.', '"I am not afraid," said {name}.',
    '"Who can help me?" asked {name}.',
    '"How strange!" said {name}.', '"I will not give up," {name} said.', "{name} thought about it for a long time.",
    "{name} began to cry.",
    "{name} ran as fast as the wind.", '"Come with me," said {name}.', "",
]  # fmt: skip
MIDDLES = [
    "{name} walked over the {spot2} and asked a {adj2} {friend}.", "A {adj2} {friend} heard it and came to help.",
    "So {name} went to the {job}, who knew everything.", "Together with a {friend}, {name} looked {place2}.",
    "{name} climbed on a {thing2} and looked around.", 'The {friend} laughed and said, "Look under the {thing2}!"',
    'The {job} smiled and said, "Try some {food} first."',
    "For {number} days {name} searched, and for {number2} nights.",
    "Behind a {colour2} {thing2} sat a {friend} and smiled.", "{name} gave the {friend} a {colour2} {thing2}.",
    "They shared the {food} and made a plan.", "Near the {spot2} they saw a {colour2} light.",
]  # fmt: skip
ENDINGS = [
    "In the end they all ate {food} together.", "From that day on {name} and the {friend} were friends.",
    "{name} was {mood2} and went home.", "And {name} never felt {mood} again.",
    "At last {name} found what was lost, and everybody danced.",
    "That night {name} slept very well.", "And if they are not gone, they still live {place}.",
    "{name} learned that it is good to be {adj3}.",
    "So {name} became the most {adj3} {hero} of all.", "Now the {thing2} hangs over the door, and {name} is {mood2}.",
    "They laughed until the moon came up.", "The end.",
]  # fmt: skip
TIMES = words("morning evening day night winter summer spring autumn Monday Sunday")
MOODS = words("lonely sad tired bored afraid cold")
GOOD_MOODS = words("happy glad proud cheerful content")
NUMBERS = words("two three four five six seven nine ten twelve")
VIEWS = ["", "big ", "dark ", "quiet ", "faraway "]
IN_PLACE = {
    "island": "on", "mountain": "on", "beach": "on", "farm": "on", "river": "by", "lake": "by", "harbour": "by",
    "bridge": "under", "market": "near",
}  # else "in"  # fmt: skip


def tell(rng: Random, hero: str | None = None) -> str:
    """One story, about `hero` if given."""
    names = rng.sample(NAMES, 2)
    spots = rng.sample(PLACES, 3)
    where = [f"{IN_PLACE.get(spot, 'in')} a {rng.choice(VIEWS)}{spot}" for spot in spots]
    hero = hero or rng.choice(ANIMALS if rng.random() < 0.75 else JOBS)
    words = {
        "hero": hero, "name": names[0], "friend": rng.choice([a for a in ANIMALS if a != hero]), "place": where[0],
        "Place": where[0].capitalize(), "place2": where[1], "spot": spots[0], "spot2": spots[1],
        "time": rng.choice(TIMES),
        "food": rng.choice(FOODS), "thing": rng.choice(THINGS), "thing2": rng.choice(THINGS),
        "colour": rng.choice(COLOUR_WORDS),
        "colour2": rng.choice(COLOUR_WORDS), "mood": rng.choice(MOODS), "mood2": rng.choice(GOOD_MOODS),
        "job": rng.choice(JOBS),
        "number": rng.choice(NUMBERS), "number2": rng.choice(NUMBERS), **dict(zip(["adj", "adj2", "adj3"],
        rng.sample(ADJECTIVES, 3), strict=True)),
    }  # fmt: skip
    parts = [rng.choice(OPENINGS), rng.choice(HABITS), rng.choice(TROUBLES), rng.choice(SPEECH)]
    parts += rng.sample(MIDDLES, rng.choice([1, 1, 2, 2, 3]))
    parts += [rng.choice(SPEECH), *rng.sample(ENDINGS[:-1], rng.choice([1, 1, 2]))]
    if rng.random() < 0.2:
        parts.append(ENDINGS[-1])
    return with_articles(" ".join(part for part in parts if part).format(**words))


def with_articles(text: str) -> str:
    """``a owl`` becomes ``an owl``."""
    return re.sub(r"\b([Aa])(?= (?:[aeioAEIO]|umbrella))", r"\1n", text)


REQUESTS = [
    "Tell me a story about a {hero}.", "Tell me a story.", "Tell a story about a {hero}.",
    "Write a short story about a {hero}.",
    "Can you tell me a story about a {hero}?", "I want to hear a story about a {hero}.",
    "A story about a {hero}, please.",
    "Please tell me a short story.", "Make up a story about a {hero}.", "Write a story.", "Do you know a story?",
]  # fmt: skip
