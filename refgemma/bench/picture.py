"""The roofline picture: how fast each piece of work runs, under what memory and arithmetic allow.

A piece of work stands at its operations per byte that must be read. Left of the edge memory is the limit, a slanted
line; right of it arithmetic, a level one.

References
----------
Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model", 2009.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from refgemma.bench import plan
from refgemma.bench.counts import bytes_read, operations
from refgemma.config import Config
from refgemma.errors import InputError
from refgemma.files.pictures import FAINT, check_format, image, new_figure, plain

# Apart in lightness as well, for print and for colour-blind eyes.
_COLOURS = {"float32": "#0a58b0", "bfloat16": "#d9822b"}
_LIMITS = {"float32": "gemv", "bfloat16": "tiles"}  # how fast each format can be read at best
_MARKS = {"refgemma": "o", "transformers": "x"}


class Point(NamedTuple):
    """A piece of work: operations a byte, and operations a second."""

    engine: str
    weights: str
    measure: str
    intensity: float
    rate: float


def points(found: dict[str, Any], config: Config) -> list[Point]:
    """Place every piece of work that was timed."""
    placed = []
    for engine, forms in found["engines"].items():
        for form, measures in forms.items():
            for name, work, read in _work(config, form):
                if (seconds := measures[name]) is not None:
                    placed.append(Point(engine, form, name, work / read, work / seconds))
    return placed


def picture(found: dict[str, Any], config: Config, *, format: str = "png") -> bytes:
    """Draw the roofline."""
    check_format(format)
    placed = points(found, config)
    limits = found["limits"]
    if not placed or any(limits[name] is None for name in ("gemm", *(_LIMITS[form] for form in found["weights"]))):
        raise InputError("no engine or no limit was measured to the end: there is nothing to draw")
    figure = new_figure(8, 5.2)
    axes = figure.subplots()
    left, right = min(p.intensity for p in placed) / 2.5, max(p.intensity for p in placed) * 2.5
    level = limits["gemm"] / 1e9
    slopes = {form: limits[name] / 1e9 for form, name in _LIMITS.items() if form in found["weights"]}
    for form, slope in slopes.items():
        edge = level / slope
        axes.plot([left, edge], [slope * left, level], color=_COLOURS[form], label=f"read {form}: {slope:.0f} GB/s")
    edge = level / max(slopes.values())
    axes.plot([edge, right], [level, level], color=FAINT, label=f"compute in float32: {level:,.0f} G operations/s")
    for point in placed:
        first = point.measure == placed[0].measure
        axes.plot(
            point.intensity,
            point.rate / 1e9,
            _MARKS[point.engine],
            color=_COLOURS[point.weights],
            markersize=7,
            markeredgewidth=2,
            linestyle="none",
            label=f"{point.engine}, {point.weights}" if first else None,
        )
        if point.engine == "refgemma":
            left_of = point.weights == "float32"
            above = left_of != (point.measure == "decode_4096")  # beside its neighbour, decode_128, there is no room
            axes.annotate(
                point.measure.replace("_", " "),
                (point.intensity, point.rate / 1e9),
                xytext=(-7 if left_of else 7, 6 if above else -12),
                textcoords="offset points",
                ha="right" if left_of else "left",
                fontsize=7,
                color=_COLOURS[point.weights],
            )
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set_xlabel("operations for each byte of weights and cache")
    axes.set_ylabel("G operations/s")
    processor = plain(str(found["machine"]["processor"]))
    axes.set_title(f"{found['size']} on {found['machine']['cores']} cores of {processor}", fontsize=9, loc="left")
    axes.grid(which="major", color="#eeece8")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return image(figure, format)


def _work(config: Config, form: str) -> list[tuple[str, int, int]]:
    """Name, operations, and bytes of every piece of work."""
    steps = [
        (
            name,
            operations(config, tokens=1, context=context, rows=rows),
            bytes_read(config, form, context=context, rows=rows),
        )
        for name, (context, rows) in plan.DECODE.items()
    ]
    prompts = [
        (name, operations(config, tokens=count), bytes_read(config, form, context=count))
        for name, count in plan.PREFILL.items()
    ]
    return steps + prompts
