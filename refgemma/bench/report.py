"""What the measurements say: one summary for programs, tables of it for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from refgemma.bench import plan
from refgemma.bench.bars import bars, verdicts
from refgemma.bench.figures import median_of, values_of
from refgemma.bench.run import Round
from refgemma.config import Config

# Name of a measure: in words, and what is shown of it, a number of tokens that its seconds are for, or a unit.
_MEASURES: dict[str, tuple[str, int | str]] = {
    "load": ("load", "s"),
    "first_token": (f"load and first token of a prompt of {plan.FIRST}", "s"),
    "prefill_128": (f"prefill of {plan.SHORT}", plan.SHORT),
    "prefill_2048": (f"prefill of {plan.LONG}", plan.LONG),
    "decode_128": (f"decode at {plan.NEAR}", 1),
    "decode_4096": (f"decode at {plan.FAR}", 1),
    "decode_8_rows": (f"decode at {plan.NEAR}, {plan.ROWS} rows", plan.ROWS),
    "memory.rss": ("peak memory", "GB"),
    "memory.rss_anon": ("peak memory without files", "GB"),
}


class Table(NamedTuple):
    """A table of texts."""

    title: str  # line above it
    columns: tuple[str, ...]  # headings
    rows: Sequence[tuple[str, ...]]  # one text a column; the first is words, the others are numbers


def summary(
    size: str, config: Config, weights: Sequence[str], machine: dict[str, Any], rounds: Sequence[Round]
) -> dict[str, Any]:
    """Put everything into one record."""
    values = [values_of(told) for told in rounds]

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
        "bars": verdicts(list(bars(config, weights, tiny=size == "tiny")), values),
        "failures": [
            {"round": number, "engine": job.engine, "weights": job.weights, "failure": failure}
            for number, told in enumerate(rounds, start=1)
            for job, _, failure in told
            if failure
        ],
        "values": values,
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """Lay a summary out for people."""
    laid_out = [_machine(found), _limits(found), _measures(found), _bars(found)]
    if found["failures"]:
        rows = [
            (f"{f['engine']} {f['weights']}".strip(), f"round {f['round']}: {f['failure']}") for f in found["failures"]
        ]
        laid_out.append(Table("not measured to the end", ("", ""), rows))
    return laid_out


def _machine(found: dict[str, Any]) -> Table:
    machine = found["machine"]
    rows = [("processor", machine["processor"]), ("cores", str(machine["cores"]))]
    if machine["memory"]:
        rows.append(("memory", f"{machine['memory'] / 1e9:.0f} GB"))
    if machine["load"] is not None:
        rows.append(("load when it began", f"{machine['load']:.1f}"))
    rows.append(("versions", ", ".join(f"{name} {number}" for name, number in machine["versions"].items())))
    for one in found["about"]:
        rows.append((one["engine"], ", ".join(filter(None, [one.get("blas"), f"{one['threads']} threads"]))))
    rows += [("environment", f"{name}={value}") for name, value in machine["environment"].items()]
    rounds = f"{found['rounds']} round" + "s" * (found["rounds"] > 1)
    return Table(f"{found['size']}, {found['parameters'] / 1e9:.3g} billion random weights, {rounds}", ("", ""), rows)


def _limits(found: dict[str, Any]) -> Table:
    words = {
        "gemv": ("float32 matrix through gemv", "GB/s"),
        "tiles": ("bfloat16 matrices through a bare tile loop", "GB/s"),
        "gemm": ("float32 gemm", "G operations/s"),
        "fresh": ("filling memory that is new to a process", "GB/s"),
    }
    limits = found["limits"]
    rows = [
        (what, "-" if limits[name] is None else f"{_short(limits[name] / 1e9)} {unit}")
        for name, (what, unit) in words.items()
    ]
    return Table("what this machine can do", ("", ""), rows)


def _measures(found: dict[str, Any]) -> Table:
    """Measures by engine; a ratio above one says that we are faster, or thriftier."""
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
                ratio = found["ratios"][form][name]
                row += [
                    _shown(found["engines"]["transformers"][form][name], kind),
                    "-" if ratio is None else f"{ratio:.2f}",
                ]
        rows.append(tuple(row))
    return Table("beside transformers: ratio above 1 where refgemma is ahead" * peers, tuple(columns), rows)


def _bars(found: dict[str, Any]) -> Table:
    rows = []
    for bar in found["bars"]:
        sign = "at least" if bar["at_least"] else "at most"
        rows.append(
            (
                bar["what"],
                "-" if bar["measured"] is None else f"{bar['measured']:.2f}",
                "" if bar["bar"] is None else f"{sign} {bar['bar']:g}",
                "" if bar["aim"] is None else f"{bar['aim']:g}",
                {True: "yes", False: "no", None: ""}[bar["reached"]],
            )
        )
    return Table("bars, set for gemma-2b on 4 cores", ("", "measured", "bar", "aim", "reached"), rows)


def _shown(value: float | None, kind: int | str) -> str:
    """Seconds as they are, or as tokens a second; bytes as GB."""
    if value is None:
        return "-"
    if isinstance(kind, int):
        return _short(kind / value)
    return _short(value / 1e9 if kind == "GB" else value)


def _short(number: float) -> str:
    """Three digits, without an exponent."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}" if number >= 1 else f"{number:.3f}"
