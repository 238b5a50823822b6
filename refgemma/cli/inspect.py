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
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from refgemma.checkpoint.folder import INDEX, SINGLE, find_model, read_folder
from refgemma.checkpoint.load import check_tensors
from refgemma.checkpoint.names import tensors_of
from refgemma.cli.adapter import describe_adapter, print_adapter
from refgemma.cli.doctor import run_doctor
from refgemma.cli.options import add_json, add_model
from refgemma.cli.terminal import print_json, print_table, size
from refgemma.config import SIZES, Config, read_config, to_json
from refgemma.files.safetensors import StoredTensor

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

    ours: str
    theirs: str
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
        help="show this LoRA adapter too, and whether it fits; may be given several times",
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
        tensors = [e._asdict() | {"count": math.prod(e.shape), "dtype": e.dtype or None} for e in entries]
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
        except ValueError as error:
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
    """In the order of the name table; what is no part of the model comes last."""
    entries = []
    for tensor in tensors_of(replace(config, tie_word_embeddings=False)):
        if tensor.name in stored:
            found = stored[tensor.name]
            entries.append(Entry(tensor.path, tensor.name, found.shape, found.dtype, found.nbytes))
        elif not (tensor.path == "head" and config.tie_word_embeddings):
            entries.append(Entry(tensor.path, tensor.name, tensor.shape, otherwise, 0))
    known = {entry.theirs for entry in entries}
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
    rows = [_row(entry.ours, entry.theirs, [entry]) for entry in entries] if every else list(_summary(entries, config))
    rows = [_HEADINGS, *rows, ("", "", "", "", *_row("", "", entries)[4:])]
    if not any(entry.nbytes for entry in entries):
        rows = [(*row[:3], row[4]) for row in rows]  # nothing is stored
    print_table(rows[0], rows[1:], title=f"{len(entries)} tensors, {config.num_parameters:,} parameters", text=(0, 1))


_HEADINGS = ("name", "name in the file", "shape", "dtype", "numbers", "bytes")


def _row(ours: str, theirs: str, alike: list[Entry]) -> tuple[str, ...]:
    shape = " x ".join(map(str, alike[0].shape))
    numbers, nbytes = sum(math.prod(entry.shape) for entry in alike), sum(entry.nbytes for entry in alike)
    return ours, theirs, shape, alike[0].dtype, f"{numbers:,}", size(nbytes)


def _summary(entries: list[Entry], config: Config) -> Iterator[tuple[str, ...]]:
    """Layers share a line for each of their tensors, and a line for what is common to the names of all of them."""
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((_template(entry.ours), _template(entry.theirs), entry.shape, entry.dtype), []).append(entry)
    heading = True
    for alike in groups.values():
        ours, theirs = _template(alike[0].ours), _template(alike[0].theirs)
        if ours.startswith("layers."):
            if heading:
                yield "layers.{i}.*", "model.layers.{i}.*.weight", f"{config.num_layers} x", "", "", ""
            heading = False
            some = "" if len(alike) == config.num_layers else f" ({len(alike)} of {config.num_layers})"
            ours, theirs = ours.partition("}.")[2] + some, theirs.partition("}.")[2].removesuffix(".weight")
            ours, theirs = f"  {ours}", f"  {theirs}"
        yield _row(ours, theirs, alike)


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
