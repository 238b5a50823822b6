"""What there is to see of one decision: candidates down, steps across, a probability in each cell.

Terminal, picture and page all draw this table, so that they cannot tell different stories.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from refgemma.sampling.decision import GREEDY_BELOW
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.record import Record
from refgemma.text.token_texts import spell

TOKEN, DRAWN = "\u25b8", "\u25b9"
BORDERS = (0.9, 0.5, 0.2, 0.05, 0.01)  # of the classes of surprise


@dataclass(frozen=True)
class Column:
    """One step."""

    name: str  # ``model`` for the logits as they came, then the steps in order, then ``greedy`` where nothing is drawn
    setting: str = ""  # its setting, in words
    removed: int = 0  # how many tokens it removed
    mass: float = 0.0  # their probability, of what was left before
    margin: float | None = None  # between the last token kept and the first removed

    @property
    def title(self) -> str:
        """Name and setting."""
        return f"{self.name.replace('_', ' ')} {self.setting}".rstrip()


@dataclass(frozen=True)
class Row:
    """One candidate."""

    token: int  # its id
    label: str  # its text, readable
    logit: float | None  # as the model gave it; None for minus infinity
    probs: tuple[float | None, ...]  # after each column; None once it is removed
    logits: tuple[float | None, ...]  # as `probs`
    # a full triangle for the token of the record, an empty one for what its settings draw where that is another
    mark: str = ""

    @property
    def chosen(self) -> bool:
        """Whether it is the token of the record."""
        return self.mark == TOKEN


@dataclass(frozen=True)
class View:
    """One decision."""

    columns: tuple[Column, ...]  # across
    rows: tuple[Row, ...]  # down, the most likely first

    def head(self, count: int) -> View:
        """Only the rows that matter most."""
        wanted = {i for i, row in enumerate(self.rows) if i < count or row.mark}
        for j in range(1, len(self.columns)):
            kept = [i for i, row in enumerate(self.rows) if row.probs[j] is not None]
            cut = [i for i, row in enumerate(self.rows) if row.probs[j] is None and row.probs[j - 1] is not None]
            wanted |= {kept[-1], cut[0]} if kept and cut else set()
        return View(self.columns, tuple(row for i, row in enumerate(self.rows) if i in wanted))


def view(record: Record, t: int) -> View:
    """Candidates of one decision through its steps."""
    entry = record[t]
    greedy = record.params.temperature < GREEDY_BELOW
    columns = [Column("model")]
    columns += [Column(step.name, setting(step.value), step.removed, step.mass, step.margin) for step in entry.steps]
    columns += [Column("greedy", "most likely")] if greedy else []
    rows = []
    for candidate in entry.candidates:
        logits = [candidate.raw, *candidate.logits]
        totals = [None, *(step.log_total for step in entry.steps)]
        probs = [
            None if logit is None else candidate.raw_prob if total is None else math.exp(logit - total)
            for logit, total in zip(logits, totals, strict=True)
        ]
        if greedy:
            logits.append(logits[-1] if candidate.prob else None)
            probs.append(candidate.prob or None)
        mark = TOKEN if candidate.id == entry.token else DRAWN if candidate.id == entry.drawn else ""
        rows.append(Row(candidate.id, label(record, candidate.id), candidate.raw, tuple(probs), tuple(logits), mark))
    return View(tuple(columns), tuple(rows))


def label(record: Record, token: int) -> str:
    """Text of a token, in quotes and with newlines and the like as escapes."""
    piece = record.piece(token)
    return repr(piece.replace("\u2581", " ")) if piece else f"token {token}"


def setting(value: object) -> str:
    """A setting in a word or two."""
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:g}"
    count = len(value) if hasattr(value, "__len__") else 0
    return f"{count} token{'s' * (count != 1)}" if count else ""


def texts(record: Record) -> list[str]:
    """Text that each token of the output adds."""
    return spell(record.piece(token) or f"[{token}]" for token in record.tokens)


def settings(record: Record) -> str:
    """Settings of a record that do something, and its seed."""
    plain, params = SamplingParams(), record.params
    names = [field.name for field in fields(params) if field.name not in ("temperature", "max_tokens", "stop")]
    shown = ["temperature", *(name for name in names if getattr(params, name) != getattr(plain, name))]
    return ", ".join(f"{name.replace('_', ' ')} {setting(getattr(params, name))}" for name in shown)


def probability(logprob: float | None) -> float:
    """Probability of which a record holds the logarithm."""
    return 0.0 if logprob is None else math.exp(logprob)


def surprise(logprob: float | None) -> int:
    """Class of a probability, from the certain to the surprising; colours have one each."""
    return sum(probability(logprob) < border for border in BORDERS)
