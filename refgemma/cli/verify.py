"""Check a model against every figure that others have published for it.

The model is recognised by its configuration and the checksums of a few tensors, by its name, or by --as.
Exit code 1: a figure differs, or could not be computed with this model.

examples:
  refgemma verify google/gemma-2b
  refgemma verify my-conversion --as gemma-2b --json
  refgemma verify google/gemma-2b --golden golden_data_gemma-2b.jsonl
  refgemma verify --list
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from refgemma.checkpoint.folder import find_model, read_folder
from refgemma.checkpoint.names import FAMILIES
from refgemma.cli.options import add_formats, add_json
from refgemma.cli.terminal import print_json, print_table, progress_bar, show
from refgemma.config import Config, read_config
from refgemma.errors import InputError, listed
from refgemma.files.safetensors import StoredTensor
from refgemma.gemma import load
from refgemma.oracle.published.figures import Figure, figures_of, models, read_figures
from refgemma.oracle.published.golden import golden_figures, known_file
from refgemma.oracle.published.verify import (
    Outcome,
    Recognised,
    about_parameters,
    all_on_record,
    on_record,
    recognise,
    verify,
)

_FAMILY_OF_TYPE = {"gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3"}


@dataclass(frozen=True)
class _Checked:
    """A folder, and the model it is taken for."""

    folder: Path
    config: Config
    stored: dict[str, StoredTensor]
    recognised: Recognised
    model: str | None
    how: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("name", nargs="?", metavar="MODEL", help="folder, shipped name, or hub id fetched before")
    parser.add_argument("--model", default="tiny-it", help="the same (default: tiny-it)")
    parser.add_argument("--as", dest="taken_for", metavar="NAME", help="take it for this model, such as gemma-2b")
    parser.add_argument("--list", action="store_true", help="list the figures that exist, for every model")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--golden", metavar="FILE", help="compare with full logits, JSON lines, instead of the figures")
    which.add_argument("--figures", metavar="FILE", help="check the figures in this file instead, whatever the model")
    add_formats(parser, "as stored where that is bfloat16, else as --numerics")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.list:
        return _print_list(args.json)
    if args.taken_for is not None and args.taken_for not in _computed():
        family = FAMILIES.get(models().get(args.taken_for, {}).get("family", ""))
        why = f"a {family}, which cannot be computed here yet" if family else "no model that figures exist for"
        raise InputError(f"--as is {args.taken_for!r}, {why}: expected one of {', '.join(_computed())}")
    checked = _look(args.name or args.model, args.taken_for)
    figures: Iterable[Figure]
    if args.golden is not None:
        entry = known_file(Path(args.golden))
        if entry and checked.model and entry["model"] != checked.model:
            raise InputError(
                f"{args.golden} is of {entry['model']}, the model is {checked.model}: expected one of both"
            )
        figures = golden_figures(Path(args.golden))
    else:
        figures = read_figures(args.figures) if args.figures else _figures(checked)
    weights = args.weights or ("bfloat16" if {t.dtype for t in checked.stored.values()} == {"BF16"} else None)
    with progress_bar(f"loading {checked.folder.name}") as progress:
        gemma = load(checked.folder, numerics=args.numerics, weights=weights, progress=progress)
    with progress_bar("computing the figures") as progress:
        outcomes = list(verify(gemma, figures, progress=progress))
    if not outcomes:
        raise InputError(f"{args.golden or args.figures} holds no figure: expected at least one")
    if args.json:
        _print_json(checked, outcomes)
    else:
        _print(checked, outcomes)
    return 0 if all(outcome.verdict == "holds" for outcome in outcomes) else 1


def _computed() -> list[str]:
    """Models with figures that can be computed here."""
    return [name for name, about in models().items() if about["family"] == "gemma1"]


def _look(name: str, taken_for: str | None) -> _Checked:
    """Find the folder, and tell which model it holds."""
    folder = find_model(name)
    try:
        config = read_config(folder)
    except InputError as error:
        raise InputError(f"{error}{_of_another_family(folder)}") from None
    stored = read_folder(folder)
    recognised = recognise(folder, config, stored)
    model, how = (taken_for, "by --as") if taken_for else (recognised.model, recognised.how)
    return _Checked(folder, config, stored, recognised, model, how)


def _of_another_family(folder: Path) -> str:
    """Published figures of the model, if it is a Gemma of a later family; else empty."""
    try:
        family = _FAMILY_OF_TYPE.get(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    if family is None:
        return ""
    names = [name for name, about in models().items() if about["family"] == family]
    return f"; figures of {FAMILIES[family]} are on record, for {', '.join(names)}, and cannot be computed here yet"


def _figures(checked: _Checked) -> list[Figure]:
    """Figures of the model, or a sentence on why there are none."""
    if checked.model is None:
        say = f"say which it is with --as: {', '.join(checked.recognised.candidates or _computed())}"
        raise InputError(f"{checked.folder} is not recognised: {checked.how}; {say}")
    return figures_of(checked.model)


def _print(checked: _Checked, outcomes: list[Outcome]) -> None:
    if checked.model is None:
        print(f"{checked.folder}: not recognised, {checked.how}")
    else:
        print(f"{checked.folder}: taken for {checked.model}, {checked.how}")
        print(f"{about_parameters(checked.config, checked.model)}")
        print(f"on record for {on_record(checked.model)}")
    rows = [
        (o.figure.id, o.measured.published, o.measured.computed, o.measured.tolerance, o.verdict)
        if o.measured
        else (o.figure.id, "", "", "", o.verdict)
        for o in outcomes
    ]
    headings = ("figure", "published", "computed", "tolerance", "verdict")
    print_table(headings, rows, title=f"{len(outcomes)} figures", text=range(5))
    wrong = [(outcome.figure.id, outcome.problem or "") for outcome in outcomes if outcome.verdict != "holds"]
    if wrong:
        print_table(("", ""), wrong, title="what is wrong", text=(0, 1))
    _print_reasons(outcomes)
    counts = {v: sum(o.verdict == v for o in outcomes) for v in ("holds", "differs", "not computed")}
    words = f"{counts['holds']} of {len(outcomes)} figures hold"
    words += f", {counts['differs']} differ" if counts["differs"] else ""
    words += f", {counts['not computed']} cannot be computed" if counts["not computed"] else ""
    show(f"\n{words}", style="bold")


def _print_reasons(outcomes: list[Outcome]) -> None:
    """Why each tolerance is what it is, and where figures are from: what several share once."""
    reasons = dict.fromkeys((o.figure.kind, o.figure.reason) for o in outcomes if o.figure.reason)
    print_table(("", ""), reasons, title="tolerances", text=(0, 1))
    sources: dict[tuple[str, str, str], list[str]] = {}
    for outcome in outcomes:
        figure = outcome.figure
        sources.setdefault((figure.url, figure.computed_in, figure.note), []).append(figure.id)
    rows = []
    for (url, computed_in, note), ids in sources.items():
        about = f"computed in {computed_in}" + (f". {note}" if note else "")
        rows.append((listed(ids, 1, str), url, about))
    print_table(("figure", "", ""), rows, title="sources", text=(0, 1, 2))


def _print_json(checked: _Checked, outcomes: list[Outcome]) -> None:
    about = {
        "folder": str(checked.folder),
        "model": checked.model,
        "how": checked.how,
        "candidates": list(checked.recognised.candidates),
        "checksums": dict(checked.recognised.checksums),
        "num_parameters": checked.config.num_parameters,
        "on_record": on_record(checked.model) if checked.model else None,
    }
    counts = {v.replace(" ", "_"): sum(o.verdict == v for o in outcomes) for v in ("holds", "differs", "not computed")}
    print_json(about | counts | {"figures": [outcome.as_dict() for outcome in outcomes]})


def _print_list(as_json: bool) -> int:
    families = all_on_record()
    if as_json:
        print_json(families)
        return 0
    for family, lines in families.items():
        show(f"{family}{'' if family == 'Gemma 1' else ': kept for later, refgemma computes Gemma 1'}", style="bold")
        for line in lines:
            print(f"  {line}")
    return 0
