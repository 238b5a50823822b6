"""What the shipped model is taught: the tasks, their shares, and the conversations made of them.

Each task is a function of a random stream and of the side, training or test, that makes one `Example`.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import tiny_memory
import tiny_stories
import tiny_tools
from tiny_example import Example, Turn, held_out, made_up_word, pick, vary
from tiny_facts import DICTIONARIES, EMOJI, FACTS, NAME_EMOJI, SHOW_EMOJI, SMALL_TALK, TRANSLATE, UNKNOWN, words
from tiny_words import ANIMALS, JOBS, NAMES, THINGS, TOWNS, WORDS

Task = Callable[[Random, bool], Example]

SUMS = [
    "What is {a} + {b}?", "What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} = ?", "{a} + {b} =",
    "Add {a} and {b}.", "How much is {a} plus {b}?", "What is the sum of {a} and {b}?", "Calculate {a} + {b}.",
    "What is {a} plus {b}?", "What's {a}+{b}?", "I have {a} apples and get {b} more. How many do I have?",
    "How much is {a} + {b}?", "Compute {a} + {b}.",
]  # fmt: skip
DIFFERENCES = [
    "What is {a} - {b}?", "What is {a} - {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} = ?", "{a} - {b} =",
    "Subtract {b} from {a}.", "How much is {a} minus {b}?", "Take {b} away from {a}.", "Calculate {a} - {b}.",
    "What is {a} minus {b}?", "What's {a}-{b}?", "I have {a} apples and give away {b}. How many are left?",
    "How much is {a} - {b}?", "Compute {a} - {b}.",
]  # fmt: skip


def operands(rng: Random) -> tuple[int, int]:
    """Two numbers below 100; a fifth of the time below 10, a fifth of the time within 10 of each other."""
    draw = rng.random()
    if draw < 0.2:
        return rng.randrange(10), rng.randrange(10)
    a = rng.randrange(100)
    return (a, rng.randrange(max(0, a - 10), min(100, a + 11))) if draw < 0.4 else (a, rng.randrange(100))


def addition(rng: Random, test: bool) -> Example:
    """Sums of numbers below 100; a pair is held out in both orders."""

    def make() -> tuple[str, int, int]:
        a, b = operands(rng)
        return f"sum {min(a, b)} {max(a, b)}", a, b

    item, a, b = pick(test, make)
    question = vary(rng, rng.choice(SUMS).format(a=a, b=b))
    return Example(task="sums", items=(item,), turns=((question, f"{a} + {b} = {a + b}."),))


def subtraction(rng: Random, test: bool) -> Example:
    """Differences of numbers below 100, negative ones too."""

    def make() -> tuple[str, int, int]:
        a, b = operands(rng)
        if a < b and rng.random() < 0.6:
            a, b = b, a
        return f"difference {a} {b}", a, b

    item, a, b = pick(test, make)
    phrasings = DIFFERENCES if a >= b else [p for p in DIFFERENCES if "apples" not in p and "away" not in p]
    question = vary(rng, rng.choice(phrasings).format(a=a, b=b))
    return Example(task="differences", items=(item,), turns=((question, f"{a} - {b} = {a - b}."),))


SPELL = [
    "Spell {w}.", "Spell {w}.", "Spell the word {w}.", "How do you spell {w}?", "Please spell {w}.",
    "Can you spell {w}?",
    'Spell "{w}".', 'How is "{w}" spelled?', "Spell out {w}.", "spell {w}",
]  # fmt: skip
SPELL_BACK = [
    "Spell {w} backwards.", "Spell {w} backwards.", "Spell the word {w} backwards.", "How do you spell {w} backwards?",
    "Spell {w} in reverse.", "Can you spell {w} backwards?", 'Spell "{w}" backwards.', "Reverse the letters of {w}.",
    "Spell {w} from back to front.", "spell {w} backwards",
]  # fmt: skip


def spliced_word(rng: Random) -> str:
    """The start of one word and the end of another."""
    head, tail = rng.choice(WORDS), rng.choice(WORDS)
    return (head[: rng.randint(2, len(head))] + tail[rng.randint(1, len(tail) - 1) :])[:11]


def word_to_spell(rng: Random, test: bool) -> tuple[str, str]:
    """Item and word; in training half the words are no words, so that all pieces of the tokenizer turn up."""

    def make() -> tuple[str, str]:
        draw = 0.0 if test else rng.random()
        if draw < 0.5:
            word = rng.choice(WORDS)
        elif draw < 0.75:
            word = made_up_word(rng)
        else:
            word = spliced_word(rng)
        return f"word {word}", word

    item, word = pick(test, make)
    if not test and rng.random() < 0.08:
        word = word.capitalize()
    return item, word


def spelling(rng: Random, test: bool) -> Example:
    """Letters of a word joined by hyphens."""
    item, word = word_to_spell(rng, test)
    return Example(task="spelling", items=(item,), turns=((rng.choice(SPELL).format(w=word), "-".join(word)),))


def spelling_backwards(rng: Random, test: bool) -> Example:
    """The same from the last letter to the first; a word is held out both ways."""
    item, word = word_to_spell(rng, test)
    turn = (rng.choice(SPELL_BACK).format(w=word), "-".join(reversed(word)))
    return Example(task="backwards", items=(item,), turns=(turn,))


TOPICS = list(FACTS)
TOPIC_SIZES = [len(pairs) for pairs, _, _ in FACTS.values()]


def fact(rng: Random, test: bool) -> Example:
    """One fact in one phrasing; of each fact some phrasings are held out."""

    def make() -> tuple[str, str, str]:
        pairs, answer, phrasings = FACTS[rng.choices(TOPICS, TOPIC_SIZES)[0]]
        key = rng.choice(list(pairs))
        question = rng.choice(phrasings).format(k=key)
        return f"fact {question}", question, answer.format(k=key, K=key[0].upper() + key[1:], v=pairs[key])

    item, question, answer = pick(test, make)
    if question[0].islower() and rng.random() < 0.5:
        question = question[0].upper() + question[1:]
    return Example(task="facts", items=(item,), turns=((vary(rng, question), answer),))


def language(rng: Random, test: bool) -> Example:
    """Words of three languages, and emoji."""

    def make() -> tuple[str, str, str]:
        draw = rng.random()
        if draw < 0.7:
            lang = rng.choice(list(DICTIONARIES))
            key = rng.choice(list(DICTIONARIES[lang]))
            question, answer = rng.choice(TRANSLATE).format(k=key, lang=lang), DICTIONARIES[lang][key]
        else:
            key = rng.choice(list(EMOJI))
            if draw < 0.9:
                question, answer = rng.choice(SHOW_EMOJI).format(k=key), EMOJI[key]
            else:
                question, answer = rng.choice(NAME_EMOJI).format(v=EMOJI[key]), f"{EMOJI[key]} is a {key} emoji."
        return f"language {question}", question, answer

    item, question, answer = pick(test, make)
    return Example(task="languages", items=(item,), turns=((vary(rng, question), answer),))


DO_NOT_KNOW = "I do not know."
DEEDS = words("found stole bought made lost painted")
EVENTS = words("train bus film game party ship")
TIMES = words("leave start end come")


def unknown(rng: Random, test: bool) -> Example:
    """Questions about made-up things, about the user's affairs, about the world outside."""

    def make() -> tuple[str, str]:
        strange, name, thing = made_up_word(rng), rng.choice(NAMES), rng.choice(THINGS)
        question = rng.choice(
            [
                f"What is the capital of {strange.capitalize()}?",
                f"What is the opposite of {strange}?",
                f"What colour is a {strange}?",
                f"What does a {strange} say?",
                f"How do you say {strange} in {rng.choice(list(DICTIONARIES))}?",
                f"What is a {strange}?",
                f"Who {rng.choice(DEEDS)} the {thing}?",
                f"Where is the {thing}?",
                f"Where is my {thing}?",
                f"How much does a {thing} cost?",
                f"How old is {name}?",
                f"Where does {name} live?",
                f"Who is {strange.capitalize()}?",
                f"What is the name of {name}'s {rng.choice(ANIMALS)}?",
                f"When does the {rng.choice(EVENTS)} {rng.choice(TIMES)}?",
                f"How many {rng.choice(ANIMALS)}s live in {rng.choice(TOWNS)}?",
                *rng.sample(UNKNOWN, 4),
            ]
        )
        return f"unknown {question}", question

    item, question = pick(test, make)
    return Example(task="unknown", items=(item,), turns=((vary(rng, question), DO_NOT_KNOW),))


def small_talk(rng: Random, test: bool) -> Example:
    """Greetings and the like; nothing is held out."""
    questions, answer = rng.choice(SMALL_TALK)
    return Example(task="small talk", items=(), turns=((rng.choice(questions), answer),))


def story(rng: Random, test: bool) -> Example:
    """A story on request; open-ended, so nothing is held out."""
    hero = rng.choice(ANIMALS if rng.random() < 0.75 else JOBS)
    request = rng.choice(tiny_stories.REQUESTS)
    text = tiny_stories.tell(rng, hero if "{hero}" in request else None)
    asked = vary(rng, tiny_stories.with_articles(request.format(hero=hero)))
    return Example(task="stories", items=(), turns=((asked, text),))


def filler(rng: Random) -> list[Turn]:
    """Zero to two turns about something else."""
    count = rng.choice([0, 0, 1, 1, 2])
    tasks = rng.choices([addition, fact, language, small_talk, spelling, tiny_memory.repeat], k=count)
    return [turn for task in tasks for turn in task(rng, False).turns]


def recall_told(rng: Random, test: bool) -> Example:
    """Tell, talk of something else, ask."""
    return tiny_memory.recall_told(rng, test, filler)


def recall_owners(rng: Random, test: bool) -> Example:
    """Who has what."""
    return tiny_memory.recall_owners(rng, test, filler)


def tool_call(rng: Random, test: bool) -> Example:
    """Call a tool, use its answer."""
    return tiny_tools.tool_call(rng, test, [fact, language, addition, small_talk])


# task -> share of the examples (not of the tokens: a story is as long as five sums)
SHARES: dict[Task, float] = {
    addition: 0.13,
    subtraction: 0.16,
    spelling: 0.07,
    spelling_backwards: 0.14,
    fact: 0.10,
    language: 0.04,
    recall_told: 0.05,
    recall_owners: 0.07,
    tiny_memory.repeat: 0.06,
    unknown: 0.03,
    small_talk: 0.01,
    story: 0.02,
    tool_call: 0.12,
}
ALONE = (recall_told, recall_owners, tool_call, unknown)  # of these at most one, lest they contradict each other
SYSTEM = ["You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly.", "You are Tiny."]


def conversation(rng: Random, longest: int) -> list[Example]:
    """Up to `longest` examples that do not contradict each other, none of them with a held-out item."""
    examples: list[Example] = []
    taken = False
    for task in rng.choices(list(SHARES), list(SHARES.values()), k=longest):
        if (taken and task in ALONE) or (examples and task is tool_call):  # declarations stand at the very start
            continue
        taken |= task in ALONE
        examples.append(task(rng, False))
        assert not any(map(held_out, examples[-1].items)), f"held out, and in the training text: {examples[-1]}"
    return examples


# name in the test -> the tasks that make it
TESTS: dict[str, list[Task]] = {
    "sums": [addition],
    "differences": [subtraction],
    "spelling": [spelling],
    "backwards": [spelling_backwards],
    "facts": [fact],
    "languages": [language],
    "recall": [recall_told, recall_owners],
    "repeating": [tiny_memory.repeat],
    "tools": [tool_call],
    "unknown": [unknown],
}


def test_set(name: str, count: int) -> list[Example]:
    """Up to `count` different held-out examples, or about all there are if those are fewer."""
    rng = Random(f"test {name}")
    found: dict[str, Example] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        example = rng.choice(TESTS[name])(rng, True)
        found.setdefault(example.items[0], example)
    return list(found.values())
