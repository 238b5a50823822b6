"""A record as one HTML page that needs only a browser: the text, and behind each token its decision."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

from refgemma.sampling.decision import GREEDY_BELOW
from refgemma.sampling.explain import counted, percent
from refgemma.sampling.record import Record
from refgemma.sampling.show.table import BORDERS, Column, label, probability, settings, surprise, texts, view
from refgemma.text.token_texts import spell

_DIGITS = 6  # significant, of every number on the page


def page(record: Record, *, title: str = "", progress: Callable[[int, int], None] | None = None) -> str:
    """Write a record as a page, in ASCII; `progress` is called with the number of tokens done and of all.

    Whatever came from a model is data: JSON in which ``<``, ``>`` and ``&`` are escaped, so that no text can end the
    script element, and put on the page as text, never as markup.
    """
    template, style, script = (
        resources.files(__package__).joinpath(name).read_text(encoding="ascii")
        for name in ("page.html", "decision.css", "decision.js")
    )
    data = json.dumps(_data(record, progress), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    heading = html.escape(title or "Why these tokens").encode("ascii", "xmlcharrefreplace").decode()
    parts = {"{{title}}": heading, "{{style}}": style, "{{script}}": script, "{{record}}": data}
    # In one pass, so that no part is searched for the name of another.
    return re.sub("|".join(parts), lambda match: parts[match[0]], template)


def _data(record: Record, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    tokens = []
    for t, text in enumerate(texts(record)):
        tokens.append(token_data(record, t, text))
        if progress is not None:
            progress(t + 1, len(record))
    prompt = [record.piece(token) for token in record.prompt_tokens]
    return {
        "settings": settings(record),
        "greedy": record.params.temperature < GREEDY_BELOW,
        "legend": legend(),
        "prompt": "".join(spell(prompt)) if all(prompt) else "",
        "prompt_label": f"the prompt, {len(prompt)} tokens",
        "tokens": tokens,
    }


def legend() -> list[str]:
    """Name the classes of surprise."""
    percent = [f"{border * 100:g} %" for border in BORDERS]
    between = (f"{low} to {high}" for low, high in zip(percent[1:], percent, strict=False))
    return [f"{percent[0]} and more", *between, f"below {percent[-1]}"]


def token_data(record: Record, t: int, text: str) -> dict[str, Any]:
    """What a page shows of one decision."""
    entry, table = record[t], view(record, t)
    return {
        "id": entry.token,
        "text": text,
        "label": label(record, entry.token),
        "surprise": surprise(entry.raw_logprob),
        "prob": _short(probability(entry.raw_logprob)),
        "nats": None if entry.raw_logprob is None else _short(-entry.raw_logprob),
        "final": None if entry.logprob is None else _short(math.exp(entry.logprob)),
        "entropy": [_short(entry.raw_entropy), _short(entry.entropy)],
        "rank": entry.rank,
        "kept": entry.kept,
        "u": entry.u,
        "interval": entry.interval,
        "flip": _short(entry.flip),
        "near_tie": entry.near_tie,
        "why": record.explain(t),
        "columns": [{"title": column.title, "note": _note(column)} for column in table.columns],
        "rows": [
            {
                "id": row.token,
                "label": row.label,
                "chosen": row.chosen,
                "mark": row.mark,
                "probs": [_short(p) for p in row.probs],
                "logits": [_short(logit) for logit in row.logits],
            }
            for row in table.rows
        ],
    }


def _note(column: Column) -> str:
    return f"\u2212{counted(column.removed)}, {percent(column.mass)}" if column.removed else ""


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")
