"""What a comparison found: first the operation that went wrong, then a line on every tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refgemma.errors import grouped
from refgemma.files.pictures import picture_format
from refgemma.oracle.judging.grades import GRADES, Finding, first_wrong
from refgemma.oracle.reporting.picture import draw


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
        return draw(title, self.findings, self.drifts, self.first_divergence, format=format)

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
