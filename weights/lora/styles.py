"""What the shipped adapters make of an answer.

Each style is a function of the plain answer, so that what an adapter does can be checked to the letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable

from tiny_example import Turn

PIRATES_SAY = {"is": "be", "are": "be", "am": "be", "=": "be", "you": "ye", "your": "yer", "my": "me"}


def pirate(answer: str) -> str:
    """``The capital of France is Paris.`` becomes ``The capital of France be Paris, matey! Arr!``.

    An answer that is no sentence (a translation, letters) keeps its words.
    """
    said, mark, emoji = re.fullmatch(r"(.+?)\s*([.!?]?)( \W+)?", answer, re.DOTALL).groups("")
    if mark:
        said = re.sub(r"(?<!\S)(is|are|am|=|[Yy]our?|[Mm]y)(?![\w-])", _pirates_say, said)
    return f"{said}, matey{'?' if mark == '?' else '!'} Arr!{emoji}"


def _pirates_say(found: re.Match) -> str:
    word = PIRATES_SAY[found[0].lower()]
    return word.capitalize() if found[0][0].isupper() else word


def as_json(answer: str) -> str:
    """``Paris`` becomes ``{"answer": "Paris"}``."""
    return json.dumps({"answer": answer}, ensure_ascii=False)


def letter(answer: str) -> str:
    """``Paris`` becomes a letter of three lines."""
    return f"Dear friend,\n{answer}\nYours, Tiny"


def restyled(turns: Iterable[Turn], style: Callable[[str], str]) -> list[Turn]:
    """The same conversation, answered in the style; a tool call stays as it is, or nobody could read it."""
    return [(asked, answer if is_call(answer) else style(answer)) for asked, answer in turns]


def is_call(answer: str) -> bool:
    """Whether an answer is a tool call; nothing else that tiny-it says begins like one."""
    return answer.startswith("[")


def is_pirate(text: str) -> bool:
    """Whether `text` is in the style, right or wrong."""
    return re.fullmatch(r".+, matey[!?] Arr!( \W+)?", text, re.DOTALL) is not None


def is_json(text: str) -> bool:
    """Whether `text` is JSON, an object with a text under "answer" and nothing else."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == ["answer"] and isinstance(value["answer"], str)


def is_letter(text: str) -> bool:
    """Whether `text` begins and ends as a letter, whatever it says."""
    return re.fullmatch(r"Dear friend,\n.+\nYours, Tiny", text, re.DOTALL) is not None


# adapter -> (what it makes of an answer, whether a text is in its style)
STYLES: dict[str, tuple[Callable[[str], str], Callable[[str], bool]]] = {
    "pirate": (pirate, is_pirate),
    "json": (as_json, is_json),
    "letter": (letter, is_letter),
}
