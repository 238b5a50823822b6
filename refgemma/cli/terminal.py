"""What the terminal shows: progress bars on standard error, tables and JSON on standard output."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from refgemma.checkpoint.load import Progress

# A bar that comes and goes at once is noise.
_DELAY = 0.5  # seconds
# Where output goes to a file or another program, no column is cut.
_ENDLESS = 10_000


@contextmanager
def progress_bar(what: str, unit: str = "") -> Iterator[Progress | None]:
    """Show how far some work is, if it takes more than a moment."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.text import Text

    class Rate(rich_progress.ProgressColumn):
        def render(self, task: rich_progress.Task) -> Text:
            return Text(f"{task.speed:,.0f} {unit}/s" if unit and task.speed else "")

    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        Rate(),
        rich_progress.TimeElapsedColumn(),
    )
    bar = rich_progress.Progress(*columns, console=Console(stderr=True, markup=False, emoji=False), transient=True)
    task = bar.add_task(what, total=None)
    timer = threading.Timer(_DELAY, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda done, total: bar.update(task, completed=done, total=total)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def print_table(
    columns: Sequence[str], rows: Iterable[Iterable[str]], *, title: str = "", text: Collection[int] = ()
) -> None:
    """Print a table, and an empty line before it if it has a title."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=any(columns))
    for number, heading in enumerate(columns):
        table.add_column(heading, justify="left" if number in text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    if title:
        show(f"\n{title}", style="bold")
    show(table)


def show(what: Any, style: str = "") -> None:
    """Print something that rich draws, or a text unchanged."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _ENDLESS
    console = Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)
    sys.stdout.flush()  # otherwise rich does, and exits with 1 if the reader is gone
    with console.capture() as drawn:
        console.print(what, style=style)
    sys.stdout.write(drawn.get())


def print_json(value: Any) -> None:
    """Print one line of JSON."""
    print(to_json(value), flush=True)


def to_json(value: Any) -> str:
    """Write JSON in ASCII, which every terminal and pipe carries."""
    return json.dumps(_finite(value), allow_nan=False)


def size(nbytes: int) -> str:
    """Bytes to three digits, in the largest binary unit of which there is one."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 2**power:
            value = nbytes / 2**power
            return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return f"{nbytes} B"


def visible(piece: str) -> str:
    """Name of a token with nothing in it that moves the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
