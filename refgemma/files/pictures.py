"""Pictures drawn by matplotlib, without pyplot: no window opens and no global state changes.

::

    form = picture_format("audit.png")     # checks the ending and matplotlib, before the work begins
    figure = new_figure(8.0, 5.2)          # inches
    figure.suptitle(plain("costs $5"))     # not a formula
    data = image(figure, form)             # bytes, for `whole_file`
"""

from __future__ import annotations

import functools
import importlib.util
import io
from pathlib import Path
from typing import Any, Literal

from refgemma.errors import InputError

Format = Literal["png", "svg", "pdf"]
FORMATS: tuple[Format, ...] = ("png", "svg", "pdf")
FAINT = "#6b6862"  # text and lines of less weight, readable on white


def picture_format(path: str | Path) -> Format:
    """Format that the ending of a file name asks for; refuses other endings, and a missing matplotlib."""
    ending = Path(path).suffix
    found = next((form for form in FORMATS if ending == f".{form}"), None)
    if found is None:
        raise InputError(
            f"{path} ends in {ending or 'nothing'!r}: expected {', '.join(f'.{form}' for form in FORMATS)}"
        )
    check_format(found)
    return found


def check_format(form: str) -> None:
    """Refuse an unknown format, and a missing matplotlib."""
    if form not in FORMATS:
        raise InputError(f"unknown picture format {form!r}: expected {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('pictures are drawn with matplotlib, which is not installed: pip install "refgemma[plot]"')


def new_figure(width: float, height: float) -> Any:
    """Empty figure of a size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def image(figure: Any, form: str) -> bytes:
    """Content of the image file."""
    out = io.BytesIO()
    figure.savefig(out, format=form, dpi=160)
    return out.getvalue()


def plain(text: str, longest: int = 90) -> str:
    """Text without formulas, in characters that matplotlib's font has; each line cut to `longest` characters."""
    known = _characters()
    lines = []
    for line in text.split("\n"):
        shown = "".join(c if ord(c) in known else f"<U+{ord(c):04X}>" for c in line)
        shown = shown if len(shown) <= longest else f"{shown[: longest - 1]}\u2026"
        lines.append(shown.replace("$", r"\$"))
    return "\n".join(lines)


@functools.cache
def _characters() -> frozenset[int]:
    from matplotlib import font_manager, ft2font

    return frozenset(ft2font.FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap())
