"""The errors that refgemma raises for input it cannot use, and how they say much in few words.

Any other exception is a bug in refgemma.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

_LAYER_NUMBER = re.compile(r"(?<=layers[._/])\d+|(?<=layer[._/])\d+|(?<=states[._/])\d+|(?<=attentions[._/])\d+")
_MOST_LINES = 20


class InputError(ValueError):
    """Input that cannot be used: the message says what was given, what was expected, and what to do."""


class InputTypeError(InputError, TypeError):
    """Input of the wrong Python type."""


def listed(names: Sequence[str], most: int = 6, show: Callable[[str], str] = repr) -> str:
    """The first names, and how many there are besides: ``'a', 'b' and 3 more``."""
    return ", ".join(map(show, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def grouped(lines: Iterable[str]) -> list[str]:
    """Lines that differ only in the layer as one: ``layers.*.out (18 of them)``."""
    return [same[0] if len(same) == 1 else f"{kind} ({len(same)} of them)" for kind, same in _by_layer(lines).items()]


def all_problems(problems: Sequence[str]) -> str:
    """The end of an error: one problem as it is, several as a list, those that every layer has as one line."""
    lines = [
        same[0] + (f" (and {len(same) - 1} more like it in other layers)" if same[1:] else "")
        for same in _by_layer(problems).values()
    ]
    if len(lines) == 1:
        return lines[0]
    shown = lines[:_MOST_LINES] + [f"and {len(lines) - _MOST_LINES} more kinds"] * (len(lines) > _MOST_LINES)
    return f"{len(problems)} problems:" + "".join(f"\n  {line}" for line in shown)


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Most similar of the known names, in the same layer if that has any."""
    import difflib  # slow to import, and needed for mistakes only

    known = list(known)
    same_layer = [other for other in known if re.findall(r"\d+", other) == re.findall(r"\d+", name)]
    return next(iter(difflib.get_close_matches(name, same_layer or known, n=1)), None)


def _by_layer(lines: Iterable[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for line in lines:
        kinds.setdefault(_LAYER_NUMBER.sub("*", line), []).append(line)
    return kinds
