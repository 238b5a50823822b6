"""An audit as a picture: one heat map per measure, layer by module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refgemma.errors import InputError
from refgemma.files.pictures import FAINT, check_format, image, new_figure, plain
from refgemma.lora.audit import Audit, WeightAudit
from refgemma.numerics import Array

_ABSENT = "#eeece8"  # cells of weights that no adapter changes


class _Measure(NamedTuple):
    """One heat map."""

    title: str
    value: Callable[[WeightAudit], float | None]
    text: Callable[[float], str]
    colours: str
    highest: float | None  # number with the darkest colour; None for the largest one found
    logarithmic: bool = False


def picture(audit: Audit, *, title: str = "", format: str = "png") -> bytes:
    """Draw an audit."""
    check_format(format)
    if not audit.weights:
        raise InputError("the adapter changes no weight: there is nothing to draw")

    measures = (
        _Measure("effective rank", lambda w: w.effective_rank, lambda x: f"{x:.1f}", "Blues", None),
        _Measure("size of the update, |d| / |W|", lambda w: w.relative_norm, _short, "Blues", None, True),
        _Measure(f"unmoved by {audit.dtype}", lambda w: w.unmoved, lambda x: f"{100 * x:.0f}%", "Oranges", 1.0),
        _Measure("error of the update", lambda w: w.update_error, lambda x: f"{x:.2f}", "Oranges", 1.0),
    )
    modules, layers, others = _axes_of(audit)
    wide = max(2.0, 0.5 * len(modules) + 0.3)  # inches per heat map
    high = 0.26 * (len(layers) + len(others)) + 0.1
    heading = _heading(audit, title)
    above = 0.2 * len(heading.splitlines()) + 0.8
    figure = new_figure(len(measures) * wide + 1.3, high + above)
    figure.suptitle(heading, fontsize=9.5, x=0.01, ha="left")
    rows = [n for n in (len(layers), len(others)) if n]
    areas = figure.subplots(len(rows), len(measures), squeeze=False, height_ratios=rows)
    for j, measure in enumerate(measures):
        grids = _values(audit, measure, modules, layers, others)
        shades = [np.log10(np.where(grid > 0, grid, np.nan)) if measure.logarithmic else grid for grid in grids]
        known = np.concatenate([shade[np.isfinite(shade)] for shade in shades])
        highest = known.max(initial=-np.inf) if measure.highest is None else measure.highest
        lowest = known.min(initial=highest) - 0.1 if measure.logarithmic else 0.0
        for i, (grid, shade) in enumerate(zip(grids, shades, strict=True)):
            _heat_map(areas[i, j], grid, shade, measure, (lowest, highest))
            names = layers if layers and i == 0 else others
            areas[i, j].set_yticks(range(len(names)), names if j == 0 else [""] * len(names), fontsize=8)
        areas[0, j].set_title(measure.title, fontsize=9.5, loc="left", pad=8)
        if layers:
            top = areas[0, j]
            top.set_xticks(range(len(modules)), modules, fontsize=8, rotation=40, ha="left", rotation_mode="anchor")
            top.xaxis.tick_top()
            top.tick_params(axis="x", length=0, pad=2)
    if layers:
        areas[0, 0].set_ylabel("layer", fontsize=8)
    return image(figure, format)


def _axes_of(audit: Audit) -> tuple[list[str], list[str], list[str]]:
    """Changed modules, the range of changed layers, and changed weights outside the layers."""
    parts = [w.path.split(".", 2) for w in audit.weights if w.path.startswith("layers.")]
    modules = list(dict.fromkeys(name for _, _, name in parts))
    numbers = [int(i) for _, i, _ in parts]
    layers = [str(i) for i in range(min(numbers), max(numbers) + 1)] if numbers else []
    return modules, layers, [w.path for w in audit.weights if not w.path.startswith("layers.")]


def _values(audit: Audit, measure: _Measure, modules: list[str], layers: list[str], others: list[str]) -> list[Array]:
    """Numbers of a measure, layer by module, then a column of weights outside the layers; NaN if unchanged."""
    found = {w.path: measure.value(w) for w in audit.weights}

    def grid(paths: list[list[str]]) -> Array:
        values = [[found.get(path) for path in row] for row in paths]
        return np.array([[math.nan if value is None else value for value in row] for row in values])

    grids = [[[f"layers.{i}.{module}" for module in modules] for i in layers], [[path] for path in others]]
    return [grid(paths) for paths in grids if paths]


def _heat_map(axes: Any, grid: Array, shade: Array, measure: _Measure, ends: tuple[float, float]) -> None:
    """Coloured cells, each with its number."""
    from matplotlib import colormaps

    colours = colormaps[measure.colours].with_extremes(bad=_ABSENT)
    lowest, highest = ends if np.isfinite(ends).all() and ends[0] < ends[1] else (0.0, 1.0)
    # Without the darkest third of the colours, black text stays readable.
    top = highest + 0.6 * (highest - lowest)
    axes.imshow(shade, aspect="auto", cmap=colours, vmin=lowest, vmax=top, interpolation="nearest")
    for (i, j), value in np.ndenumerate(grid):
        text = measure.text(value) if math.isfinite(value) else "\u2013"
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color="black" if math.isfinite(value) else FAINT)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    # White lines between the cells.
    axes.set_xticks(np.arange(grid.shape[1] - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(grid.shape[0] - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)


def _heading(audit: Audit, title: str) -> str:
    """Title and summary."""
    total, title = audit.total, f"{title}: " if title else ""
    if math.isnan(total.update_error):
        return f"{title}the update is zero everywhere"
    lines = [
        f"{title}merged in {audit.dtype}, {100 * total.unmoved:.3g} % of the changed numbers"
        f" stay where they were; error of the whole update {total.update_error:.3g}"
    ]
    if audit.logits:
        lines.append(f"against the adapter attached, at the {audit.logits[0].positions} positions of the prompt:")
    lines += [
        f"    {change.model}: logits differ by up to {change.max_abs:.2g}, KL {change.mean_kl:.2g} nats,"
        f" another token is the most likely at {change.flips}"
        for change in audit.logits
    ]
    return plain("\n".join(lines), longest=200)


def _short(x: float) -> str:
    """Two digits, with a short exponent."""
    return "0" if x == 0 else f"{x:.2g}".replace("e-0", "e-")
