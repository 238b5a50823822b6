"""What a comparison found: first the operation that went wrong, then a line on every tensor; and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refgemma.errors import grouped
from refgemma.files.pictures import FAINT, image, new_figure, picture_format, plain
from refgemma.oracle.judging.grades import GRADES, Finding, first_wrong
from refgemma.oracle.operations import split_name

# ---- How the picture looks

_WIDEST = 24.0  # inches
_NAMED = 40  # operations that have room for their names
# Distinguished by shape as well as by colour.
_MARKS = {"inside rounding": ("o", "#0a58b0"), "suspicious": ("D", "#b06f00"), "wrong": ("X", "#b3261e")}
_BAND = "#cfe0f3"


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """Verdict on a trace.

    Parameters
    ----------
    candidate : str
        The trace that was judged.
    model : str
        The model that it was judged by.
    shape : tuple of int
        Rows and positions of its tokens.
    arithmetic : str
        The arithmetic that it was judged as, and why.
    findings : tuple of Finding
        Each tensor on the candidate's own inputs, in the order of the computation; empty where only logits were given.
    drifts : tuple of Finding
        Residual stream and logits, where given; reference and candidate each run by itself.
    notes : tuple of str
        What was assumed in reading the file.
    """

    candidate: str
    model: str
    shape: tuple[int, int]
    arithmetic: str
    findings: tuple[Finding, ...]
    drifts: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def drift(self) -> Finding | None:
        """How far the end result drifted: the logits, or the last of the stream that was given; None without either."""
        return self.drifts[-1] if self.drifts else None

    @property
    def first_divergence(self) -> Finding | None:
        """First operation that is wrong; if none is, what drifted too far first; or None."""
        return first_wrong([*self.findings, *self.drifts])

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.first_divergence is None

    @property
    def hidden(self) -> str:
        """What right numbers cannot show, if they are logits alone in half precision; else empty."""
        narrow = "bfloat16" if self.arithmetic.startswith(("bfloat16", "bf16")) else ""
        narrow = "float16" if self.arithmetic.startswith("float16") else narrow
        if not narrow or self.findings or not self.ok:
            return ""
        such = " (A2, B4, B5, B6, G1)" if narrow == "bfloat16" else ""
        return (
            f"{narrow} logits alone hide bugs of the size of a rounding{such}: a trace shows them; "
            "if they were computed in float32 and only stored so, judge them as float32"
        )

    def text(self) -> str:
        """The whole report, for people.

        Returns
        -------
        str
            Lines: the verdict, the first divergence, a table of all tensors, what was assumed.
        """
        B, T = self.shape
        lines = [f"{self.candidate} against {self.model}, {B} x {T} tokens, as {self.arithmetic}", "", *self._verdict()]
        lines += [note for note in self.notes if note.startswith("left out: ")]
        given = [finding for finding in self.findings if finding.grade != "not given"]
        if given:
            lines += ["", "every operation on its own inputs, in the order of the computation", *_table(given, "bound")]
        missing = grouped([finding.name for finding in self.findings if finding.grade == "not given"])
        if missing:
            lines += ["", "not given, replaced by the reference's: " + ", ".join(missing)]
        if self.drift is not None:
            lines += ["", "each engine run by itself", *_table(self.drifts, "budget")]
            lines += [f"  budget of {self.drift.name}: {self.drift.reason}"]
        if self.notes:
            lines += ["", "read as", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The whole report, for programs.

        Returns
        -------
        dict
            Numbers, texts, lists and dicts.
        """
        first = self.first_divergence
        return {
            "ok": self.ok,
            "candidate": self.candidate,
            "model": self.model,
            "tokens": list(self.shape),
            "arithmetic": self.arithmetic,
            "first_divergence": None if first is None else asdict(first),
            "findings": [asdict(finding) for finding in self.findings],
            "drift": [asdict(finding) for finding in self.drifts],
            "hidden": self.hidden,
            "notes": list(self.notes),
        }

    def picture(self, path: str | Path) -> None:
        """Draw errors against depth, with the budget.

        Parameters
        ----------
        path : str or Path
            Ends in ``.png``, ``.svg`` or ``.pdf``.

        Raises
        ------
        ValueError
            If it ends in something else, or matplotlib is not installed.
        """
        Path(path).write_bytes(self.drawn(picture_format(path)))

    def drawn(self, format: str) -> bytes:
        """Draw the picture without writing it.

        Parameters
        ----------
        format : {"png", "svg", "pdf"}
            What to draw it as.

        Returns
        -------
        bytes
            Content of the image file.
        """
        title = f"{Path(self.candidate).name} against {self.model}"
        return _draw(title, self.findings, self.drifts, self.first_divergence, format=format)

    def _verdict(self) -> list[str]:
        """The result in a few lines."""
        counts = {grade: sum(finding.grade == grade for finding in self.findings) for grade in reversed(GRADES)}
        tally = ", ".join(f"{n} {grade}" for grade, n in counts.items() if n)
        first = self.first_divergence
        if first is None:
            words = "nothing is wrong" + (f": {tally}" if tally else "")
            drift = [] if self.drift is None else [f"{self.drift.name}: {_measure(self.drift, 'budget')}"]
            return [words, *drift, *([self.hidden] if self.hidden else [])]
        drifted = any(first is one for one in self.drifts)
        if drifted:
            head = f"WRONG: {first.name}, each engine run by itself"
            head += "; no single operation is, of those given" if self.findings else ""
        else:
            head = f"WRONG at {first.name}, the first of {tally}"
        limit = "budget" if drifted else "bound"
        place = ", ".join(map(str, first.where))
        lines = [
            head,
            f"  {_measure(first, limit)}",
            f"  at [{place}]: candidate {first.value_candidate:.9g}, reference {first.value_reference:.9g}",
        ]
        lines += [f"  pattern: {first.pattern}"] if first.pattern else []
        return [*lines, f"  {limit}: {first.reason}"]


def _table(findings: Sequence[Finding], limit: str) -> list[str]:
    """One line each, in columns set by their widest entry."""
    rows = [("operation", "grade", f"error/{limit}", "error", limit, "pattern")]
    for one in findings:
        numbers = (_number(one.ratio), _number(one.error), _number(one.bound))
        rows.append((one.name, one.grade, *numbers, one.pattern))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = (0, 1, 5)  # flush left; numbers flush right
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _measure(finding: Finding, limit: str) -> str:
    return f"error {_number(finding.error)} is {_number(finding.ratio)} of its {limit} {_number(finding.bound)}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


# ---- the picture: the error of every operation against depth, beside its bound, and how far runs drift


def _draw(
    title: str, findings: Sequence[Finding], drifts: Sequence[Finding], first: Finding | None, *, format: str = "png"
) -> bytes:
    """Draw the findings of a report, its first divergence by name."""
    local = [finding for finding in findings if finding.grade != "not given"]
    names = [finding.name for finding in local or drifts]
    panels = bool(local) + bool(drifts)
    width = min(_WIDEST, max(8.0, 2.0 + 0.085 * len(names)))
    figure = new_figure(width, 1.4 + 3.0 * panels)
    verdict = "nothing is wrong" if first is None else f"wrong at {first.name}"
    figure.suptitle(plain(f"{title}: {verdict}"), fontsize=11, fontweight="bold")
    rows = list(figure.subplots(max(panels, 1), 1, sharex=True, squeeze=False)[:, 0])
    if local:
        _operations(rows[0], local, first)
    if drifts:
        _drifts(rows[-1], drifts, [names.index(finding.name) for finding in drifts])
    _depth(rows, names)
    return image(figure, format)


def _operations(axes: Any, findings: Sequence[Finding], first: Finding | None) -> None:
    """Error of each operation on the engine's own inputs, in units of its bound."""
    ratios = [one.ratio for one in findings]
    floor, ceiling = _floor(ratios), 3 * max([*_finite(ratios), 1.0])
    axes.axhspan(floor, 1, color=_BAND, lw=0, label="bound")
    heights = [min(max(ratio, floor), ceiling) for ratio in ratios]
    _points(axes, findings, range(len(findings)), heights)
    for i, one in enumerate(findings):
        if one is first:
            left = i > len(findings) / 2
            axes.annotate(
                plain(first.name),
                (i, heights[i]),
                xytext=(-8 if left else 8, 4),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=9,
                color=_MARKS["wrong"][1],
            )
    axes.set_ylim(floor, 3 * ceiling)
    axes.set_ylabel("error / bound", fontsize=8)
    axes.set_title("every operation on the engine's own inputs", fontsize=9, loc="left")
    _plain_axes(axes)


def _drifts(axes: Any, findings: Sequence[Finding], places: Sequence[int]) -> None:
    """Error of the stream against depth, and its budget, when each engine runs by itself."""
    floor = _floor([value for one in findings for value in (one.error, one.bound)])
    ceiling = 3 * max(_finite([value for one in findings for value in (one.error, one.bound)]))
    budget = [max(one.bound, floor) for one in findings]
    if len(findings) > 1:
        axes.fill_between(places, floor, budget, color=_BAND, lw=0, label="budget")
    else:
        axes.axhspan(floor, budget[0], color=_BAND, lw=0, label="budget")
    errors = [min(max(one.error, floor), ceiling) for one in findings]
    axes.plot(places, errors, lw=0.8, color=FAINT)
    _points(axes, findings, places, errors)
    axes.set_ylim(floor, 3 * ceiling)
    axes.set_ylabel("error", fontsize=8)
    axes.set_title("residual stream and logits, each engine run by itself", fontsize=9, loc="left")
    _plain_axes(axes)


def _points(axes: Any, findings: Sequence[Finding], places: Sequence[int], heights: Sequence[float]) -> None:
    """One mark a finding, by its grade."""
    for grade, (marker, colour) in _MARKS.items():
        at = [i for i, one in enumerate(findings) if one.grade == grade]
        if at:
            size = 14 if grade == "inside rounding" else 40
            x, y = [places[i] for i in at], [heights[i] for i in at]
            axes.scatter(x, y, s=size, marker=marker, color=colour, label=grade, zorder=3)
    axes.set_yscale("log")


def _depth(rows: Sequence[Any], names: Sequence[str]) -> None:
    """One tick a layer and a line where it begins, or a name for each operation where there are few."""
    layers = [split_name(name)[0] for name in names]
    if len(names) <= _NAMED:
        rows[-1].set_xticks(range(len(names)), [plain(name) for name in names], rotation=90, fontsize=7)
    else:
        starts = [i for i, layer in enumerate(layers) if layer is not None and (i == 0 or layer != layers[i - 1])]
        rows[-1].set_xticks([i - 0.5 for i in starts], [f"layer {layers[i]}" for i in starts], fontsize=8, ha="left")
        for axes in rows:
            for i in starts:
                axes.axvline(i - 0.5, color=FAINT, lw=0.3, zorder=0)
    rows[-1].set_xlim(-0.7, len(names) - 0.3)


def _plain_axes(axes: Any) -> None:
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _floor(values: Sequence[float]) -> float:
    """Where 0 is drawn: below every other number."""
    positive = [value for value in _finite(values) if value > 0]
    return min(positive) / 3 if positive else 1e-12


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)] or [1.0]
