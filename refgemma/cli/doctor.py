"""What `refgemma inspect --doctor` does: examine a folder, and print one line a remark."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from refgemma.checkpoint.folder import find_model
from refgemma.checkpoint.health.doctor import examine
from refgemma.checkpoint.health.folder import Remark
from refgemma.cli.terminal import print_json, print_table, progress_bar

_SIGNS = {"wrong": "WRONG", "look": "look", "fine": "fine"}


def run_doctor(name: str, *, as_json: bool) -> int:
    """Examine a model folder, and print what was found."""
    folder = Path(name).expanduser()
    folder = folder if folder.is_dir() else find_model(name)
    with progress_bar(f"reading {folder.name}") as progress:
        remarks = examine(folder, progress=progress)
    wrong = sum(remark.grade == "wrong" for remark in remarks)
    if as_json:
        print_json({"folder": str(folder), "wrong": wrong, "remarks": [asdict(remark) for remark in remarks]})
    else:
        print(f"{folder}: {('all is well', 'one thing is wrong')[wrong] if wrong < 2 else f'{wrong} things are wrong'}")
        print_table(("", "", ""), [(_SIGNS[r.grade], r.about, _line(r)) for r in remarks], text=(0, 1, 2))
    return 1 if wrong else 0


def _line(remark: Remark) -> str:
    return f"{remark.what}: {remark.todo}" if remark.todo else remark.what
