"""Teach tool calls: declarations in the prompt, a question, the call, the tool's result, the answer made of it."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import tiny_stories
from tiny_example import Example, Turn, made_up_word, pick, vary
from tiny_facts import DAYS, words
from tiny_words import ANIMALS, COLOUR_WORDS, NAMES, THINGS, TOWNS, WORDS

from refgemma.text import tools

# name, description, {parameter: kind of value}, ways to ask, {field of the result: kind of value}, answer
TOOLS: list[tuple[str, str, dict[str, str], list[str], dict[str, str], str]] = [
    ("get_weather", "Weather in a city", {"city": "town"},
     ["What is the weather in {city}?", "How is the weather in {city}?"],
     {"weather": "sky", "degrees": "small"}, "It is {weather} in {city}, {degrees} degrees."),
    ("get_time", "Time in a city", {"city": "town"}, ["What time is it in {city}?", "Tell me the time in {city}."],
     {"time": "clock"}, "It is {time} in {city}."),
    ("multiply", "Multiply two numbers", {"a": "number", "b": "number"},
     ["What is {a} times {b}?", "Multiply {a} by {b}.", "What is {a} * {b}?"],
     {"result": "big"}, "{a} times {b} is {result}."),
    ("get_price", "Price of an item", {"item": "thing"},
     ["How much does a {item} cost?", "What is the price of a {item}?"],
     {"price": "small"}, "The {item} costs {price} euros."),
    ("get_distance", "Distance between two cities", {"start": "town", "end": "town"},
     ["How far is it from {start} to {end}?"], {"km": "big"}, "It is {km} km from {start} to {end}."),
    ("send_message", "Send a message to a person", {"to": "name", "text": "phrase"},
     ["Send {to} the message: {text}", "Write to {to}: {text}"],
     {"status": "done"}, "I have sent the message to {to}."),
    ("set_alarm", "Set an alarm", {"hour": "hour"}, ["Wake me at {hour}.", "Set an alarm for {hour}."],
     {"status": "done"}, "The alarm is set for {hour}."),
    ("play_song", "Play a song", {"title": "phrase"}, ["Play the song {title}.", "I want to hear the song {title}."],
     {"status": "done"}, "Now playing {title}."),
    ("turn_on", "Turn a device on", {"device": "thing"}, ["Turn on the {device}.", "Switch the {device} on."],
     {"status": "done"}, "The {device} is on."),
    ("turn_off", "Turn a device off", {"device": "thing"}, ["Turn off the {device}.", "Switch the {device} off."],
     {"status": "done"}, "The {device} is off."),
    ("find_person", "Where a person is", {"name": "name"}, ["Where is {name}?", "Find {name}."],
     {"place": "town"}, "{name} is in {place}."),
    ("get_age", "Age of a person", {"name": "name"}, ["How old is {name}?", "What is the age of {name}?"],
     {"age": "small"}, "{name} is {age} years old."),
    ("book_table", "Book a table", {"people": "hour", "day": "day"},
     ["Book a table for {people} on {day}.", "I need a table for {people} people on {day}."],
     {"status": "done"}, "I have booked a table for {people} on {day}."),
    ("feed", "Feed an animal", {"animal": "animal"}, ["Feed the {animal}.", "The {animal} is hungry."],
     {"status": "done"}, "I have fed the {animal}."),
    ("count_stock", "How many items are in stock", {"item": "thing", "colour": "colour"},
     ["How many {colour} {item}s do we have?", "Count the {colour} {item}s."],
     {"count": "small"}, "We have {count} of the {colour} {item}s."),
]  # fmt: skip
SYNONYMS = {
    "city": ["place", "town", "location"], "item": ["thing", "object", "product"], "name": ["person", "who"],
    "to": ["receiver", "name"], "text": ["message", "words"], "hour": ["time", "at"], "title": ["song", "name"],
    "device": ["what", "target"], "people": ["guests", "count"], "a": ["x", "first"], "b": ["y", "second"],
    "start": ["source"], "end": ["target", "goal"], "animal": ["pet", "who"],
}  # fmt: skip
SKIES = words("sunny cloudy rainy windy snowy foggy")
INTEGERS = ("number", "hour")


def value(rng: Random, kind: str) -> str | int:
    """An argument or a field of a result."""
    match kind:
        case "town":
            return rng.choice(TOWNS) if rng.random() < 0.7 else made_up_word(rng).capitalize()
        case "name":
            return rng.choice(NAMES) if rng.random() < 0.7 else made_up_word(rng).capitalize()
        case "number":
            return rng.randrange(2, 100)
        case "hour":
            return rng.randrange(1, 13)
        case "small":
            return rng.randrange(1, 40)
        case "big":
            return rng.randrange(10, 5000)
        case "clock":
            return f"{rng.randrange(24)}:{rng.randrange(60):02d}"
        case "phrase":
            count = rng.choice([1, 2, 3])
            return " ".join(rng.choice(WORDS) if rng.random() < 0.8 else made_up_word(rng) for _ in range(count))
        case "done":
            return "ok"
    return rng.choice({"thing": THINGS, "day": DAYS, "animal": ANIMALS, "colour": COLOUR_WORDS, "sky": SKIES}[kind])


def declare(rng: Random, tool: tuple) -> tuple[dict[str, Any], dict[str, str]]:
    """A declaration of `tool`, sometimes under other names so that it has to be read, and its parameters' names."""
    name, description, parameters, *_ = tool
    if rng.random() < 0.3:
        noun = name.split("_")[-1]
        name = rng.choice([made_up_word(rng), f"{made_up_word(rng)}_{noun}", f"do_{name}", f"{name}_now", noun])
    names = {p: rng.choice(SYNONYMS[p]) if p in SYNONYMS and rng.random() < 0.3 else p for p in parameters}
    if len(set(names.values())) < len(names):
        names = {p: p for p in parameters}
    properties = {names[p]: {"type": "integer" if kind in INTEGERS else "string"} for p, kind in parameters.items()}
    if rng.random() < 0.1:
        properties = {name: {**schema, "description": f"The {name}"} for name, schema in properties.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"name": name, "description": description, "parameters": schema}, names


def tool_call(rng: Random, test: bool, others: list) -> Example:
    """One to three declared tools and a question for one of them; in training sometimes for none, or only later."""

    def make() -> tuple[Any, ...]:
        chosen = rng.sample(TOOLS, rng.choice([1, 1, 1, 2, 2, 3]))
        declared = [declare(rng, tool) for tool in chosen]
        target = rng.randrange(len(chosen))
        (declaration, names), parameters = declared[target], chosen[target][2]
        values = {p: value(rng, kind) for p, kind in parameters.items()}
        call = {"name": declaration["name"], "arguments": {names[p]: given for p, given in values.items()}}
        text = tools.render_calls([call])
        return f"call {text}", text, values, [declaration for declaration, _ in declared], chosen[target][3:]

    item, call, values, declarations, (questions, result_kinds, answer) = pick(test, make)
    question = rng.choice(questions).format(**values)
    preamble = tools.render_preamble(declarations)
    result = {field: value(rng, kind) for field, kind in result_kinds.items()}
    if not test and rng.random() < 0.1:
        plain = rng.choice(others)(rng, False)
        asked, said = plain.turns[0]
        return Example(task="tools", items=plain.items, turns=((preamble + asked, said),))
    turns: list[Turn] = [(preamble + vary(rng, question), call)]
    if not test and rng.random() < 0.15:
        asked, said = others[-1](rng, False).turns[0]
        turns = [(preamble + asked, said), (question, call)]
    said = tiny_stories.with_articles(answer.format(**values, **result))
    turns.append((tools.render_results([json.dumps(result, ensure_ascii=False)]), said))
    return Example(task="tools", items=(item,), turns=tuple(turns), asked=(-2, -1))
