"""A comparison as a picture: the error of every operation against depth, beside its bound, and how far runs drift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from refgemma.files.pictures import FAINT, image, new_figure, plain
from refgemma.oracle.judging.grades import Finding
from refgemma.oracle.operations import split_name

_WIDEST = 24.0  # inches
_NAMED = 40  # operations that have room for their names
# Distinguished by shape as well as by colour.
_MARKS = {"inside rounding": ("o", "#0a58b0"), "suspicious": ("D", "#b06f00"), "wrong": ("X", "#b3261e")}
_BAND = "#cfe0f3"


def draw(
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
