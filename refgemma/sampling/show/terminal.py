"""A record in the terminal: a line a token, and a table with bars for one decision."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from refgemma.sampling.record import Record
from refgemma.sampling.show.view import Column, Row, label, probability, surprise, view

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"
_BLOCK = "\u2588"
_CANDIDATES = 10
_BAR = 8  # characters
_STYLES = ("", "", "yellow", "yellow", "bold yellow", "bold red")  # a class of surprise each


def overview(record: Record) -> Table:
    """One line a token."""
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
    """Candidates of one decision through its steps, with bars."""
    whole = view(record, t)
    shown = whole.head(count)
    across = [_heading(column) for column in shown.columns]
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


def percent(p: float) -> str:
    """A probability, in three digits."""
    return f"{100 * p:.3g} %"


def _cell(row: Row, j: int) -> Text | str:
    from rich.text import Text

    p = row.probs[j]
    if p is not None:
        return Text.assemble((bar(p), "green" if row.chosen else "cyan"), f" {percent(p)}")
    if j == 0:
        return "-inf"
    return Text("removed", style="red") if row.probs[j - 1] is not None else ""


def _heading(column: Column) -> str:
    removed = f"\n\u2212{column.removed:,}, {percent(column.mass)}" if column.removed else ""
    return column.title + removed


def _table(*headings: str, left: tuple[int, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number in left else "right", overflow="fold")
    return table
