"""What the measurements say: a record for programs, tables for people, and the roofline picture.

Numbers of a round are named ``ENGINE.WEIGHTS.MEASURE``: ``refgemma.float32.decode_128`` (seconds),
``refgemma.bfloat16.memory.rss`` (bytes), and for the machine ``refgemma.float32.stream`` and ``.fresh`` (bytes per
second) and ``.gemm`` (operations per second).

References
----------
Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model", 2009.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from refgemma.bench.counts import BYTES, bytes_read, operations, weights_read
from refgemma.bench.engines import DECODE, FIRST, PREFILL, ROWS
from refgemma.bench.run import Round
from refgemma.config import Config
from refgemma.errors import InputError
from refgemma.files.pictures import FAINT, check_format, image, new_figure, plain

Values = dict[str, float]

# Name of a measure: in words, and its unit, or for how many tokens its seconds are.
_MEASURES: dict[str, tuple[str, int | str]] = {
    "load": ("load", "s"),
    "first_token": (f"load and first token of a prompt of {FIRST}", "s"),
    "prefill_128": ("prefill of 128", 128),
    "prefill_2048": ("prefill of 2048", 2048),
    "decode_128": ("decode at 128", 1),
    "decode_4096": ("decode at 4096", 1),
    "decode_8_rows": (f"decode at 128, {ROWS} rows", ROWS),
    "memory.rss": ("peak memory", "GB"),
    "memory.rss_anon": ("peak memory without files", "GB"),
    "memory_long.rss": ("peak memory at full context", "GB"),
    "memory_long.rss_anon": ("peak memory at full context without files", "GB"),
}
_LIMITS = {
    "gemv": ("float32 matrix through gemv", "GB/s"),
    "tiles": ("bfloat16 matrices through a bare tile loop", "GB/s"),
    "gemm": ("float32 gemm", "G operations/s"),
    "fresh": ("filling memory that is new to a process", "GB/s"),
}
# Apart in lightness as well, for print and for colour-blind eyes.
_COLOURS = {"float32": "#0a58b0", "bfloat16": "#d9822b"}
_SLOPES = {"float32": "gemv", "bfloat16": "tiles"}  # the limit on reading each format
_MARKS = {"refgemma": "o", "transformers": "x"}


class Table(NamedTuple):
    """A table of texts: a title, headings, rows whose first text is words and whose others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def values_of(outcomes: Round) -> Values:
    """Numbers of one round; of several variants the best."""
    values: Values = {}
    for job, lines, _ in outcomes:
        for line in lines:
            name = f"{job.engine}.{job.weights}.{line['measure']}"
            found: Values = {}
            if "seconds" in line:
                found[name] = statistics.median(line["seconds"])
            elif "rate" in line:
                found[name] = line["rate"]
            found |= {f"{name}.{key}": line[key] for key in ("rss", "rss_anon") if line.get(key) is not None}
            for key, value in found.items():
                values[key] = min(value, values.get(key, value))
    return values


def median_of(rounds: Sequence[Values], number: Callable[[Values], float]) -> float | None:
    """Median over the rounds of a number computed within each; rounds that lack a measure are left out."""
    found = []
    for values in rounds:
        try:
            found.append(number(values))
        except KeyError:
            continue
    return statistics.median(found) if found else None


def _shares(config: Config, form: str) -> Iterator[tuple[str, Callable[[Values], float]]]:
    """How near refgemma comes to each limit of the machine; 1 is the limit."""
    own = f"refgemma.{form}"
    context = DECODE["decode_128"][0]
    # The tile loop reads weights only, and is compared with them only.
    read = bytes_read(config, form, context=context) if form == "float32" else BYTES[form] * weights_read(config)
    work = operations(config, tokens=PREFILL["prefill_128"])
    yield "decode / reading memory", lambda v: read / v[f"{own}.beside.decode"] / v[f"{own}.stream"]
    yield "decode / its matrix products alone", lambda v: v[f"{own}.beside.products"] / v[f"{own}.beside.decode"]
    yield "prefill of 128 / gemm", lambda v: work / v[f"{own}.beside.prefill"] / v[f"{own}.gemm"]
    if form == "float32":
        wide = BYTES[form] * config.num_parameters
        yield "load / filling new memory", lambda v: wide / v[f"{own}.fresh"] / v[f"{own}.load"]


def summary(
    size: str, config: Config, weights: Sequence[str], machine: dict[str, Any], rounds: Sequence[Round]
) -> dict[str, Any]:
    """Put everything into one record."""
    values = [values_of(outcomes) for outcomes in rounds]

    def middle(name: str) -> float | None:
        return median_of(values, lambda v: v[name])

    def ratio(form: str, measure: str) -> float | None:
        return median_of(values, lambda v: v[f"transformers.{form}.{measure}"] / v[f"refgemma.{form}.{measure}"])

    about = [
        {"engine": job.engine} | {key: line[key] for key in ("threads", "blas") if key in line}
        for job, lines, _ in rounds[0]
        for line in lines
        if line["measure"] == "about"
    ]
    return {
        "size": size,
        "parameters": config.num_parameters,
        "weights": list(weights),
        "machine": machine,
        "about": [one for i, one in enumerate(about) if one not in about[:i]],
        "rounds": len(rounds),
        "limits": {
            "gemv": middle("refgemma.float32.stream"),
            "tiles": middle("refgemma.bfloat16.stream"),
            "gemm": middle(f"refgemma.{weights[0]}.gemm"),
            "fresh": middle("refgemma.float32.fresh"),
        },
        "engines": {
            engine: {form: {name: middle(f"{engine}.{form}.{name}") for name in _MEASURES} for form in weights}
            for engine in ("refgemma", "transformers")
        },
        "ratios": {form: {name: ratio(form, name) for name in _MEASURES} for form in weights},
        "shares": {
            form: {what: median_of(values, number) for what, number in _shares(config, form)} for form in weights
        },
        "failures": [
            {"round": number, "engine": job.engine, "weights": job.weights, "failure": failure}
            for number, outcomes in enumerate(rounds, start=1)
            for job, _, failure in outcomes
            if failure
        ],
        "values": values,
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """Lay a record out for people."""
    limits = [
        (what, "-" if found["limits"][name] is None else f"{_short(found['limits'][name] / 1e9)} {unit}")
        for name, (what, unit) in _LIMITS.items()
    ]
    shares = [
        (f"{form} {what}", _two_places(share)) for form, each in found["shares"].items() for what, share in each.items()
    ]
    laid_out = [
        _machine(found),
        Table("limits of this machine", ("", ""), limits),
        _measures(found),
        Table("share of the limit that refgemma reaches", ("", "measured"), shares),
    ]
    if found["failures"]:
        rows = [(f"{f['engine']} {f['weights']}", f"round {f['round']}: {f['failure']}") for f in found["failures"]]
        laid_out.append(Table("not measured to the end", ("", ""), rows))
    return laid_out


def _machine(found: dict[str, Any]) -> Table:
    machine = found["machine"]
    rows = [("processor", machine["processor"]), ("cores", str(machine["cores"]))]
    if machine["memory"]:
        rows.append(("memory", f"{machine['memory'] / 1e9:.0f} GB"))
    if machine["load"] is not None:
        rows.append(("load at the start", f"{machine['load']:.1f}"))
    rows.append(("versions", ", ".join(f"{name} {number}" for name, number in machine["versions"].items())))
    for one in found["about"]:
        rows.append((one["engine"], ", ".join(filter(None, [one.get("blas"), f"{one['threads']} threads"]))))
    rows += [("environment", f"{name}={value}") for name, value in machine["environment"].items()]
    rounds = f"{found['rounds']} round" + "s" * (found["rounds"] > 1)
    return Table(f"{found['size']}, {found['parameters'] / 1e9:.3g} billion random weights, {rounds}", ("", ""), rows)


def _measures(found: dict[str, Any]) -> Table:
    peers = any(value is not None for form in found["engines"]["transformers"].values() for value in form.values())
    columns = ["medians"]
    for form in found["weights"]:
        columns += [f"refgemma {form}", *([f"transformers {form}", "ratio"] if peers else [])]
    rows = []
    for name, (what, kind) in _MEASURES.items():
        row = [f"{what}, {kind if isinstance(kind, str) else 'tokens/s'}"]
        for form in found["weights"]:
            row.append(_shown(found["engines"]["refgemma"][form][name], kind))
            if peers:
                row += [
                    _shown(found["engines"]["transformers"][form][name], kind),
                    _two_places(found["ratios"][form][name]),
                ]
        rows.append(tuple(row))
    return Table("beside transformers: ratio above 1 where refgemma is ahead" * peers, tuple(columns), rows)


def _shown(value: float | None, kind: int | str) -> str:
    """Seconds, or tokens per second; bytes as GB."""
    if value is None:
        return "-"
    if isinstance(kind, int):
        return _short(kind / value)
    return _short(value / 1e9 if kind == "GB" else value)


def _two_places(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _short(number: float) -> str:
    """Three digits, without an exponent."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}" if number >= 1 else f"{number:.3f}"


class Point(NamedTuple):
    """A piece of work in the roofline picture."""

    engine: str
    weights: str
    measure: str
    intensity: float  # operations per byte that must be read
    rate: float  # operations per second


def points(found: dict[str, Any], config: Config) -> list[Point]:
    """Place every piece of work that was timed."""
    placed = []
    for engine, forms in found["engines"].items():
        for form, measures in forms.items():
            work = {
                name: (
                    operations(config, tokens=1, context=context, rows=rows),
                    bytes_read(config, form, context=context, rows=rows),
                )
                for name, (context, rows) in DECODE.items()
            }
            for name, count in PREFILL.items():
                work[name] = operations(config, tokens=count), bytes_read(config, form, context=count)
            for name, (done, read) in work.items():
                if (seconds := measures[name]) is not None:
                    placed.append(Point(engine, form, name, done / read, done / seconds))
    return placed


def picture(found: dict[str, Any], config: Config, *, format: str = "png") -> bytes:
    """Draw the roofline: memory is the limit along a slanted line, arithmetic along a level one."""
    check_format(format)
    placed = points(found, config)
    limits = found["limits"]
    if not placed or any(limits[name] is None for name in ("gemm", *(_SLOPES[form] for form in found["weights"]))):
        raise InputError("no engine or no limit was measured to the end: there is nothing to draw")
    figure = new_figure(8, 5.2)
    axes = figure.subplots()
    left, right = min(p.intensity for p in placed) / 2.5, max(p.intensity for p in placed) * 2.5
    level = limits["gemm"] / 1e9
    slopes = {form: limits[name] / 1e9 for form, name in _SLOPES.items() if form in found["weights"]}
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
