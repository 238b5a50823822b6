"""A record as a picture: how surprising each token was, and the candidates of one of them through the steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from refgemma.files.pictures import FAINT, check_format, image, new_figure, plain
from refgemma.sampling.explain import percent
from refgemma.sampling.record import Record
from refgemma.sampling.show.table import View, label, settings, view

_CANDIDATES = 12
# Dark enough on white, and apart in lightness, so that print and colour-blind eyes tell them apart.
_BAR, _CHOSEN = "#9dbfe4", "#0a58b0"


def picture(record: Record, t: int | None = None, *, format: str = "png") -> bytes:
    """Draw how surprising each token was, and the candidates of token t, by default the most surprising."""
    check_format(format)
    logprobs = [record[i].raw_logprob for i in range(len(record))]
    surprises = np.array([np.inf if logprob is None else -logprob for logprob in logprobs])
    if t is None:
        t = int(surprises.argmax())
    shown = view(record, t).head(_CANDIDATES)
    several = len(record) > 1
    strip = 1.5 if several else 0.0
    bars = 1.3 + 0.28 * len(shown.rows)
    figure = new_figure(max(7.0, 2.2 + 1.75 * len(shown.columns)), strip + bars + 0.7)
    figure.suptitle(plain(settings(record)), fontsize=9, color=FAINT)
    areas = figure.subfigures(2 if several else 1, 1, height_ratios=[strip, bars] if several else None)
    if several:
        _surprises(areas[0], surprises, t)
    _candidates(areas[1] if several else areas, shown, f"token {t}: {label(record, record.tokens[t])}")
    return image(figure, format)


def _surprises(area: Any, surprises: Any, t: int) -> None:
    """One bar per token; the one below is dark."""
    axes = area.subplots()
    colours = [_CHOSEN if i == t else _BAR for i in range(len(surprises))]
    highest = surprises.max(initial=1.0, where=np.isfinite(surprises))  # an impossible token gets a bar as high
    axes.bar(range(len(surprises)), np.minimum(surprises, highest), width=0.9, color=colours)
    axes.set_xlim(-0.7, len(surprises) - 0.3)
    axes.set_ylabel("surprise, nats", fontsize=8)
    axes.set_xlabel("token", fontsize=8, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _candidates(area: Any, shown: View, title: str) -> None:
    """Horizontal bars, one panel per step."""
    area.suptitle(plain(title), fontsize=11, fontweight="bold", x=0.01, ha="left")
    panels = np.atleast_1d(area.subplots(1, len(shown.columns), sharey=True))
    for j, (axes, column) in enumerate(zip(panels, shown.columns, strict=True)):
        for i, row in enumerate(shown.rows):
            p = row.probs[j]
            if p is not None:
                axes.barh(i, p, height=0.72, color=_CHOSEN if row.chosen else _BAR)
                axes.text(p + 0.02, i, percent(p), va="center", fontsize=7.5)
            elif j == 0 or row.probs[j - 1] is not None:
                axes.text(0.02, i, "removed", va="center", fontsize=7.5, color=FAINT, style="italic")
        axes.set_title(f"{column.title}\n{column.note}", fontsize=8.5, loc="left")
        axes.set_xlim(0, 1.35)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(left=False)
    panels[0].set_yticks(range(len(shown.rows)), [plain(row.label, 28) for row in shown.rows], fontsize=8.5)
    for name, row in zip(panels[0].get_yticklabels(), shown.rows, strict=True):
        name.set_fontweight("bold" if row.chosen else "normal")
    panels[0].invert_yaxis()
