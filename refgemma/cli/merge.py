"""Write a checkpoint with LoRA adapters merged into its weights, or measure what that would lose.

OUT is a folder to make, in the layout that transformers loads: configuration, tokenizer, weights in safetensors files.
Computed in float64 and rounded once, some rows at a time, so that a model may be larger than memory.
With --audit, OUT may be left out: nothing is written then.

examples:
  refgemma merge tiny-it weights/lora/pirate merged
  refgemma merge google/gemma-2b-it mine:0.5 yours merged --dtype float32
  refgemma merge tiny-it pirate --audit --prompt "Who are you?" --picture audit.png
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refgemma import lora
from refgemma.checkpoint.folder import find_model, read_folder
from refgemma.cli.options import add_json, picture_file, text_argument
from refgemma.cli.terminal import print_json, print_table, progress_bar, size
from refgemma.errors import InputError
from refgemma.files.atomic import check_folder_place
from refgemma.gemma import load
from refgemma.lora.adapter import split_scale
from refgemma.lora.adapter_config import CONFIG_FILE
from refgemma.lora.audit import Audit, WeightAudit, audit_attached
from refgemma.lora.audit_picture import picture
from refgemma.lora.merged_checkpoint import Merged, merge_checkpoint

_ENDING = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.usage = "%(prog)s [options] BASE ADAPTER[:SCALE] [ADAPTER[:SCALE] ...] [OUT]"
    parser.add_argument("base", metavar="BASE", help="the model: folder, shipped name, or hub id fetched before")
    parser.add_argument(
        "names",
        nargs="+",
        metavar="ADAPTER[:SCALE] ... OUT",
        help="adapters, each a folder or a shipped name, with :SCALE appended to scale it; last, the folder to make",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="format of the weights (default: as each is stored; for --audit, bfloat16)",
    )
    group = parser.add_argument_group("audit")
    group.add_argument("--audit", action="store_true", help="measure what rounding the merged weights loses")
    group.add_argument("--all", action="store_true", help="list every layer")
    group.add_argument("--prompt", metavar="TEXT", help="also compare the logits of this user turn")
    group.add_argument("--picture", metavar="FILE.png|.svg|.pdf", help="save the audit as a heat map, layer by module")
    add_json(parser)
    _take_names_anywhere(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    adapters, out = _adapters_and_out(args)
    for name, _ in map(split_scale, adapters):
        lora.find_adapter(name)  # before the model is read
    _check_options(args)
    if out is not None:
        check_folder_place(Path(out).expanduser())
    found = None
    if args.audit:
        with picture_file(args.picture) as save_picture:
            audit = found = _audit(args, adapters)
            save_picture(lambda form: picture(audit, title=f"{' + '.join(adapters)} on {args.base}", format=form))
    merged = None
    if out is not None:
        with progress_bar(f"writing {out}") as progress, _ended_like_an_error():
            merged = merge_checkpoint(args.base, adapters, out, args.dtype, progress=progress)
    if args.json:
        about: dict[str, Any] = {"base": args.base, "adapters": adapters}
        about["merged"] = asdict(merged) | {"folder": str(merged.folder)} if merged else None
        print_json(about | ({"audit": asdict(found)} if found else {}))
        return 0
    if found:
        _print_audit(found, every=args.all)
    if merged:
        _print_merged(merged, above=bool(found))
    return 0


def _take_names_anywhere(parser: argparse.ArgumentParser) -> None:
    """Let OUT follow an option, as in ``mine --dtype float32 out``: argparse is done with names before it."""
    parse = parser.parse_known_args

    def parse_names(args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, rest = parse(args, namespace)
        found.names += [word for word in rest if not word.startswith("-")]
        return found, [word for word in rest if word.startswith("-")]

    parser.parse_known_args = parse_names  # type: ignore[method-assign]


def _adapters_and_out(args: argparse.Namespace) -> tuple[list[str], str | None]:
    """Separate the adapters from the folder to make, which an audit does not need."""
    *names, last = map(text_argument, args.names)
    if args.audit and (_is_adapter(last) or not names or split_scale(last)[0] != last):
        return [*names, last], None
    if not names:
        raise InputError(f"only {last!r} was given beside BASE: expected adapters and the folder to make, or --audit")
    if _is_adapter(last):
        raise InputError(
            f"{last!r} is an adapter, and no folder to make comes after it: add one, or --audit to write nothing"
        )
    return names, last


def _is_adapter(text: str) -> bool:
    """Whether a word names an adapter that is there; ``./pirate`` means that folder, and not the shipped one."""
    name, _ = split_scale(text)
    if Path(name).name != name:
        return (Path(name).expanduser() / CONFIG_FILE).is_file()
    try:
        lora.find_adapter(name)
    except FileNotFoundError:
        return False
    return True


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options without effect."""
    if not args.audit:
        for name in ("all", "prompt", "picture"):
            if getattr(args, name):
                raise InputError(f"--{name} is part of the audit: add --audit")


def _audit(args: argparse.Namespace, adapters: list[str]) -> Audit:
    stored = {tensor.dtype for tensor in read_folder(find_model(args.base)).values()}
    with progress_bar(f"loading {args.base}") as progress:
        # bfloat16 files are mapped, however large; others are widened, which changes no number.
        gemma = load(args.base, weights="bfloat16" if stored == {"BF16"} else "float32", progress=progress)
        attached = gemma
        for name, scale in map(split_scale, adapters):
            attached = attached.with_lora(lora.read(lora.find_adapter(name)), scale)
    tokens = None if args.prompt is None else gemma.encode_prompt(text_argument(args.prompt))
    with progress_bar("auditing") as progress:
        return audit_attached(gemma, attached, args.dtype or "bfloat16", tokens, progress=progress)


def _print_audit(found: Audit, *, every: bool) -> None:
    groups: dict[str, list[WeightAudit]] = {}
    for weight in found.weights:
        name = weight.path
        if not every and name.startswith("layers."):
            name = "layers.{i}." + name.split(".", 2)[2]
        groups.setdefault(name, []).append(weight)
    print(f"merged in {found.dtype}, W + d becomes round(W + d)")
    print("unmoved: where that is round(W); error: of round(W + d) - W against d, 0 is faithful, 1 as bad as no merge")
    print_table(
        ("weight", "", "rank", "effective rank", "|d| / |W|", "unmoved", "error of the update"),
        [_cells(name, alike) for name, alike in [*groups.items(), ("all", [found.total])]],
        text=(0,),
    )
    if found.logits:
        print_table(
            ("", "largest difference", "mean KL, nats", "another token first"),
            [
                (c.model, f"{c.max_abs:.3g}", f"{c.mean_kl:.3g}", f"{c.flips} of {c.positions} positions")
                for c in found.logits
            ],
            title="logits against those with the adapter attached",
            text=(0,),
        )


def _cells(name: str, alike: list[WeightAudit]) -> tuple[str, ...]:
    return (
        name,
        f"{len(alike)} x" if len(alike) > 1 else "",
        _range([w.rank for w in alike], "{:d}"),
        _range([w.effective_rank for w in alike], "{:.2f}"),
        _range([w.relative_norm for w in alike], "{:.2g}"),
        _range([100 * w.unmoved for w in alike], "{:.1f}", " %"),
        _range([w.update_error for w in alike], "{:.2f}"),
    )


def _range(values: list[Any], form: str, unit: str = "") -> str:
    """Smallest and largest of those that are numbers."""
    numbers = [value for value in values if value is not None and not math.isnan(value)]
    if not numbers:
        return "\u2013"
    ends = list(dict.fromkeys(form.format(end) for end in (min(numbers), max(numbers))))
    return " to ".join(ends) + unit


def _print_merged(merged: Merged, *, above: bool) -> None:
    files = "1 file" if merged.files == 1 else f"{merged.files} files"
    head = "; embedding and head came out different and are stored apart" if merged.untied else ""
    if above:
        print()
    about = f"{len(merged.changed)} weights changed, {merged.dtype}, {size(merged.nbytes)} in {files}{head}"
    print(f"{merged.folder}: {about}")


@contextmanager
def _ended_like_an_error() -> Iterator[None]:
    """Let signals end the program by an exception, as Ctrl-C does, so that what is half written is removed."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [signal.Signals[name] for name in _ENDING if hasattr(signal, name)]
        # An ignored signal stays ignored: nohup ignores SIGHUP.
        before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}

    def end(caught: int, _: object) -> None:
        for number in before:  # a second one would stop the cleaning up
            signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + caught)  # as shells count

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
