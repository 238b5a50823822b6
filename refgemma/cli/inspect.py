"""Show a model's configuration, its tensors, and the memory it takes.

No weights are read, and a folder that holds nothing but config.json will do.
With --doctor they are, and what is wrong with the folder is said line by line, with what to do about it.
Exit code 1 says that the files of the model do not fit its config.json, or an adapter does not fit the model, or the
doctor found something wrong.

examples:
  refgemma inspect --model google/gemma-2b-it
  refgemma inspect --model gemma-7b --json
  refgemma inspect --lora pirate
  refgemma inspect --doctor my-conversion
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refgemma import lora
from refgemma.checkpoint.contents import Remark
from refgemma.checkpoint.doctor import examine
from refgemma.checkpoint.folder import INDEX, SINGLE, find_model, read_folder
from refgemma.checkpoint.load import check_tensors
from refgemma.checkpoint.names import tensors_of
from refgemma.cli.options import add_json, add_model
from refgemma.cli.terminal import print_json, print_table, progress_bar, show, size
from refgemma.config import SIZES, Config, read_config, to_json
from refgemma.errors import InputError
from refgemma.files.safetensors import StoredTensor
from refgemma.lora.adapter import split_scale
from refgemma.lora.adapter_config import AdapterConfig
from refgemma.lora.attach import checked_scale
from refgemma.lora.fit import Change, LowRank, Replaced, fit
from refgemma.lora.hosted import LIMITS

_LETTERS = {
    "vocab_size": "V",
    "hidden_size": "D",
    "intermediate_size": "F",
    "num_layers": "L",
    "num_heads": "N",
    "num_kv_heads": "K",
    "head_dim": "H",
}
_CONTEXTS = (512, 2048, 8192)
# How matrices stay in memory, and the arithmetic that goes with it.
_FORMATS = (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64"))


class Entry(NamedTuple):
    """One tensor as the file has it, or as the model must have it where the file has none (dtype "missing" or "")."""

    path: str  # in the model
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("--all", action="store_true", help="list the tensors of every layer")
    parser.add_argument("--doctor", metavar="DIR", help="examine this folder instead, even if it cannot be loaded")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="DIR[:SCALE]",
        help="also show this LoRA adapter, and whether it fits; may be given several times",
    )
    add_json(parser)
    add_model(parser, runs=False)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.doctor is not None:
        return run_doctor(args.doctor, as_json=args.json)
    try:
        folder = find_model(args.model)
        config = read_config(folder)
    except FileNotFoundError:
        if args.model not in SIZES:
            raise
        folder, config = None, SIZES[args.model]  # a published size is known without its files
    has_weights = folder is not None and any((folder / name).is_file() for name in (SINGLE, INDEX))
    stored = read_folder(folder) if folder and has_weights else {}
    entries = _entries(config, stored, otherwise="missing" if has_weights else "")
    adapters = [describe_adapter(name, config) for name in args.lora]
    contexts = sorted({min(length, config.max_positions) for length in _CONTEXTS})

    if args.json:
        about = {"model": args.model, "folder": folder and str(folder), "config": to_json(config)}
        tensors = [
            {"ours": e.path, "theirs": e.name, "shape": e.shape, "dtype": e.dtype or None, "nbytes": e.nbytes}
            | {"count": math.prod(e.shape)}
            for e in entries
        ]
        weights = {weights: weight_bytes(config, weights, numerics) for weights, numerics in _FORMATS}
        cache = {
            numerics: {str(length): cache_bytes(config, length, numerics) for length in contexts}
            for numerics in ("float32", "float64")
        }
        memory = {"weights": weights, "cache": cache}
        shown = {"num_parameters": config.num_parameters, "tensors": tensors, "memory": memory}
        print_json(about | shown | ({"lora": adapters} if adapters else {}))
    else:
        print(f"{folder or args.model}{'' if has_weights else ': no weights here'}")
        _print_config(config)
        _print_tensors(entries, config, every=args.all)
        _print_memory(config, contexts)
        for adapter in adapters:
            print_adapter(adapter)
    problems = [adapter["problem"] for adapter in adapters if adapter["problem"]]
    if folder and has_weights:
        try:
            check_tensors(stored, config, folder)
        except InputError as error:
            problems.insert(0, str(error))
    for problem in problems:
        print(f"refgemma: {problem}", file=sys.stderr)
    return 1 if problems else 0


def weight_bytes(config: Config, weights: str, numerics: str) -> int:
    """Memory of the weights."""
    matrix = 2 if weights == "bfloat16" else np.dtype(weights).itemsize
    norm = np.dtype(numerics).itemsize
    shapes = [tensor.shape for tensor in tensors_of(config)]
    return sum(math.prod(shape) * (norm if len(shape) == 1 else matrix) for shape in shapes)


def cache_bytes(config: Config, length: int, numerics: str) -> int:
    """Memory of the keys and values of one conversation."""
    return sum(2 * c.num_kv_heads * c.head_dim for c in config.layers) * length * np.dtype(numerics).itemsize


def _entries(config: Config, stored: Mapping[str, StoredTensor], *, otherwise: str) -> list[Entry]:
    """In the order of the name table; tensors that are not part of the model come last."""
    entries = []
    for tensor in tensors_of(replace(config, tie_word_embeddings=False)):
        if tensor.name in stored:
            found = stored[tensor.name]
            entries.append(Entry(tensor.path, tensor.name, found.shape, found.dtype, found.nbytes))
        elif not (tensor.path == "head" and config.tie_word_embeddings):
            entries.append(Entry(tensor.path, tensor.name, tensor.shape, otherwise, 0))
    known = {entry.name for entry in entries}
    return entries + [Entry("?", t.name, t.shape, t.dtype, t.nbytes) for t in stored.values() if t.name not in known]


def _print_config(config: Config) -> None:
    """Two fields a line, or there would be no room left on the screen for the tensors."""
    fields = [
        (f"{name} ({_LETTERS[name]})" if name in _LETTERS else name, _value(value))
        for name, value in to_json(config).items()
    ]
    half = (len(fields) + 1) // 2
    rows = [(*left, *right) for left, right in zip_longest(fields[:half], fields[half:], fillvalue=("", ""))]
    print_table([""] * 4, rows, title="configuration", text=(0, 2))


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, bool) else f"{value:,}"


def _print_tensors(entries: list[Entry], config: Config, *, every: bool) -> None:
    rows = [_row(entry.path, entry.name, [entry]) for entry in entries] if every else list(_summary(entries, config))
    rows = [_HEADINGS, *rows, ("", "", "", "", *_row("", "", entries)[4:])]
    if not any(entry.nbytes for entry in entries):
        rows = [(*row[:3], row[4]) for row in rows]  # nothing is stored
    print_table(rows[0], rows[1:], title=f"{len(entries)} tensors, {config.num_parameters:,} parameters", text=(0, 1))


_HEADINGS = ("name", "name in the file", "shape", "dtype", "numbers", "bytes")


def _row(path: str, name: str, alike: list[Entry]) -> tuple[str, ...]:
    shape = " x ".join(map(str, alike[0].shape))
    numbers, nbytes = sum(math.prod(entry.shape) for entry in alike), sum(entry.nbytes for entry in alike)
    return path, name, shape, alike[0].dtype, f"{numbers:,}", size(nbytes)


def _summary(entries: list[Entry], config: Config) -> Iterator[tuple[str, ...]]:
    """Layers share a line for each of their tensors, and a line for what is common to the names of all of them."""
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((_template(entry.path), _template(entry.name), entry.shape, entry.dtype), []).append(entry)
    heading = True
    for alike in groups.values():
        path, name = _template(alike[0].path), _template(alike[0].name)
        if path.startswith("layers."):
            if heading:
                yield "layers.{i}.*", "model.layers.{i}.*.weight", f"{config.num_layers} x", "", "", ""
            heading = False
            some = "" if len(alike) == config.num_layers else f" ({len(alike)} of {config.num_layers})"
            path, name = path.partition("}.")[2] + some, name.partition("}.")[2].removesuffix(".weight")
            path, name = f"  {path}", f"  {name}"
        yield _row(path, name, alike)


def _template(name: str) -> str:
    return re.sub(r"\blayers\.\d+\.", "layers.{i}.", name)


def _print_memory(config: Config, contexts: list[int]) -> None:
    rows = [
        (
            weights,
            numerics,
            size(weight_bytes(config, weights, numerics)),
            *(size(cache_bytes(config, length, numerics)) for length in contexts),
        )
        for weights, numerics in _FORMATS
    ]
    headings = ["--weights", "--numerics", "weights", *(f"cache, {length:,} tokens" for length in contexts)]
    print_table(headings, rows, title="memory", text=(0, 1))


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
    except InputError as error:
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
