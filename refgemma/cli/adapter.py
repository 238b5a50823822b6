"""What `refgemma inspect --lora` shows of an adapter: its settings, its matrices, and whether it fits the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from refgemma import lora
from refgemma.cli.terminal import print_table, show, size
from refgemma.config import Config
from refgemma.lora.adapter import split_scale
from refgemma.lora.adapter_config import AdapterConfig
from refgemma.lora.attach import checked_scale
from refgemma.lora.fit import Change, LowRank, Replaced, fit
from refgemma.lora.hosted import LIMITS


def describe_adapter(name: str, config: Config) -> dict[str, Any]:
    """Read an adapter and hold it against a model."""
    name, scale = split_scale(name)
    checked_scale(scale)
    folder = lora.find_adapter(name)
    adapter = lora.read(folder)
    about: dict[str, Any] = {"folder": str(folder), "nbytes": adapter.nbytes, "config": asdict(adapter.config)}
    try:
        changes, notes = fit(adapter, config)
        about |= {"changes": _by_kind(changes, scale), "notes": notes, "problem": None}
    except ValueError as error:
        about |= {"changes": [], "notes": [], "problem": str(error)}
    return about | {"hosted": [_hosted(folder, rule) for rule in LIMITS]}


def print_adapter(about: Mapping[str, Any]) -> None:
    """Print what `describe_adapter` found."""
    defaults = {f.name: f.default for f in fields(AdapterConfig)}
    shown = [(n, v) for n, v in about["config"].items() if (v != defaults[n] and v != {}) or n in ("r", "lora_alpha")]
    title = f"adapter {Path(about['folder']).name}: {about['folder']}, {size(about['nbytes'])}"
    print_table(
        ("", ""),
        [(name, f"{value:g}" if isinstance(value, float) else str(value)) for name, value in shown],
        title=title,
        text=(0, 1),
    )
    if about["changes"]:
        rows = [[str(change[column]) for column in _COLUMNS] for change in about["changes"]]
        print_table(list(_COLUMNS), rows, title="what it changes", text=(0, 1))
    for note in about["notes"]:
        show(f"\nnote: {note}")
    rules = ("rule", "found", "wanted", "verdict")
    first = about["hosted"][0]
    rows = [[str(finding[column]) for column in rules] for finding in first["findings"]]
    print_table(rules, rows, title=f"would the hosted models take it? {_RULES[first['rule']]}", text=(0, 1, 2, 3))
    for report in about["hosted"]:
        largest, megabytes = LIMITS[report["rule"]]
        models = " and ".join(report["models"]) or "neither of the models"
        limits = f"{_RULES[report['rule']]} (rank at most {largest}, less than {megabytes} MB)"
        show(f"{limits}: {report['verdict']}; its shapes are those of {models}")


def _hosted(folder: Path, rule: str) -> dict[str, Any]:
    report = lora.check_hosted(folder, rule)
    findings = [asdict(finding) for finding in report.findings]
    return {"rule": report.rule, "verdict": report.verdict, "models": list(report.models), "findings": findings}


_RULES = {"page": "by the rule of their pages", "later": "by the later rule"}
_COLUMNS = ("name", "change", "weights", "rank", "scale")


def _by_kind(changes: list[Change], scale: float) -> list[dict[str, Any]]:
    """Layers share a line where their change is alike."""
    lines: dict[tuple[Any, ...], int] = {}
    for change in changes:
        name = ".".join("{i}" if part.isdigit() else part for part in change.path.split("."))
        kind: tuple[Any, ...]
        if isinstance(change, LowRank):
            what = "DoRA" if change.magnitude is not None else "low rank"
            what += "" if change.bias is None else " and bias"
            kind = name, what, change.down.shape[0], f"{change.scale * scale:g}"
        elif isinstance(change, Replaced):
            kind = name, "trained whole", "", ""
        else:
            kind = name, f"{len(change.ids)} rows trained whole", "", ""
        lines[kind] = lines.get(kind, 0) + 1
    return [
        dict(zip(_COLUMNS, (name, what, count, rank, scale), strict=True))
        for (name, what, rank, scale), count in lines.items()
    ]
