"""The table of one decision: candidates down, steps across, a probability in each cell; and records in the terminal.

Terminal, picture and page all draw this table, so that they agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from refgemma.sampling.decision import GREEDY_BELOW
from refgemma.sampling.explain import percent
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.record import Record
from refgemma.text.token_texts import spell

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

TOKEN, DRAWN = "\u25b8", "\u25b9"
BORDERS = (0.9, 0.5, 0.2, 0.05, 0.01)  # of the classes of surprise

_EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"
_BLOCK = "\u2588"
_CANDIDATES = 10
_BAR = 8  # characters
_STYLES = ("", "", "yellow", "yellow", "bold yellow", "bold red")  # by class of surprise


@dataclass(frozen=True)
class Column:
    """One step."""

    name: str  # ``model`` for the logits as they came, then the steps in order, then ``greedy`` where nothing is drawn
    setting: str = ""  # its setting, in words
    removed: int = 0  # how many tokens it removed
    mass: float = 0.0  # their probability, of what was left before

    @property
    def title(self) -> str:
        """Name and setting."""
        return f"{self.name.replace('_', ' ')} {self.setting}".rstrip()

    @property
    def note(self) -> str:
        """What it removed, if anything."""
        return f"\u2212{self.removed:,}, {percent(self.mass)}" if self.removed else ""


@dataclass(frozen=True)
class Row:
    """One candidate."""

    token: int  # its id
    label: str  # its text, readable
    logit: float | None  # as the model gave it; None for minus infinity
    probs: tuple[float | None, ...]  # after each column; None once it is removed
    logits: tuple[float | None, ...]  # as `probs`
    mark: str = ""  # TOKEN for the token of the record, DRAWN for what its settings draw if that is another

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
        """Only the most likely rows, the marked ones, and those on both sides of a cut."""
        wanted = {i for i, row in enumerate(self.rows) if i < count or row.mark}
        for j in range(1, len(self.columns)):
            kept = [i for i, row in enumerate(self.rows) if row.probs[j] is not None]
            cut = [i for i, row in enumerate(self.rows) if row.probs[j] is None and row.probs[j - 1] is not None]
            wanted |= {kept[-1], cut[0]} if kept and cut else set()
        return View(self.columns, tuple(row for i, row in enumerate(self.rows) if i in wanted))


def view(record: Record, t: int) -> View:
    """Table of one decision."""
    entry = record[t]
    greedy = record.params.temperature < GREEDY_BELOW
    columns = [Column("model")]
    columns += [Column(step.name, setting(step.value), step.removed, step.mass) for step in entry.steps]
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
    """Text of a token, quoted and escaped."""
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
    """Probability from a logarithm as records hold it."""
    return 0.0 if logprob is None else math.exp(logprob)


def surprise(logprob: float | None) -> int:
    """Class of a probability, 0 for certain to 5 for surprising; each has a colour."""
    return sum(probability(logprob) < border for border in BORDERS)


# ---- in the terminal


def overview(record: Record) -> Table:
    """Show a record, one line per token."""
    from rich.text import Text

    table = _table("t", "id", "token", "the model gave it", "", "drawn with", "left", "near tie", left=(2, 4, 7))
    for t in range(len(record)):
        entry = record[t]
        nats = math.inf if entry.raw_logprob is None else -entry.raw_logprob
        style = _STYLES[surprise(entry.raw_logprob)]
        table.add_row(
            str(t),
            str(entry.token),
            Text(label(record, entry.token), style=style),
            percent(probability(entry.raw_logprob)),
            Text(bar(nats / 10, 2 * _BAR), style=style or "dim"),
            "removed" if entry.logprob is None else percent(probability(entry.logprob)),
            str(entry.kept),
            entry.near_tie or "",
        )
    table.caption = f"bars: surprise, up to 10 nats; {len(record)} tokens"
    table.caption_justify = "left"
    return table


def candidates(record: Record, t: int, *, count: int = _CANDIDATES) -> Table:
    """Show one decision step by step: the `count` most likely candidates, and those on both sides of each cut."""
    shown = view(record, t).head(count)
    across = [f"{column.title}\n{column.note}".rstrip() for column in shown.columns]
    table = _table("", "id", "token", "logit", *across, left=(2, *range(4, 4 + len(across))))
    for row in shown.rows:
        logit = "-inf" if row.logit is None else f"{row.logit:.4f}"
        cells = [_cell(row, j) for j in range(len(across))]
        table.add_row(row.mark, str(row.token), row.label, logit, *cells, style="bold" if row.chosen else "")
    return table


def bar(share: float, width: int = _BAR) -> str:
    """A bar in eighths of a character."""
    eighths = round(8 * width * min(max(share, 0.0), 1.0))
    whole, rest = divmod(eighths, 8)
    return (_BLOCK * whole + (_EIGHTHS[rest] if rest else "")).ljust(width)


def _cell(row: Row, j: int) -> Text | str:
    from rich.text import Text

    p = row.probs[j]
    if p is not None:
        return Text.assemble((bar(p), "green" if row.chosen else "cyan"), f" {percent(p)}")
    if j == 0:
        return "-inf"
    return Text("removed", style="red") if row.probs[j - 1] is not None else ""


def _table(*headings: str, left: tuple[int, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number in left else "right", overflow="fold")
    return table
