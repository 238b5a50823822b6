"""Write test vectors of every operation, for a port in another language.

OUT is a folder to make: JSON and safetensors, with a README that says how to use them. No weights are read.

examples:
  refgemma vectors vectors
  refgemma vectors vectors-2b --size gemma-2b --tokenizer tokenizer.model
  refgemma vectors mine --config my-model/config.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from refgemma.checkpoint.folder import find_model
from refgemma.cli.options import add_json
from refgemma.cli.terminal import print_json, print_table, progress_bar, size
from refgemma.config import SIZES, Config, read_config
from refgemma.oracle.test_vectors.write import write_vectors
from refgemma.text.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="its widths and its tokenizer: folder, name or hub id (default: tiny-it)")
    which.add_argument("--size", choices=tuple(SIZES), help="the widths of a published size")
    which.add_argument("--config", metavar="FILE", help="the widths of this config.json")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.model (default: that of --model)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    name, config, tokenizer = _chosen(args)
    with progress_bar(f"writing {args.out}") as progress:
        files = write_vectors(args.out, config, tokenizer, name=name, progress=progress)
    if args.json:
        print_json({"model": name, "folder": args.out, "files": {path.name: path.stat().st_size for path in files}})
        return 0
    rows = [(path.name, size(path.stat().st_size)) for path in files]
    print_table(("file", ""), rows, title=f"{args.out}: vectors of {name}", text=(0,))
    if tokenizer is None:
        print("\nno tokenizer: chat.json holds texts without ids; --tokenizer FILE adds them")
    return 0


def _chosen(args: argparse.Namespace) -> tuple[str, Config, Tokenizer | None]:
    """Name, configuration and tokenizer that the options stand for."""
    tokenizer = Tokenizer(args.tokenizer) if args.tokenizer else None
    if args.size:
        return args.size, SIZES[args.size], tokenizer
    if args.config:
        return str(args.config), read_config(Path(args.config)), tokenizer
    folder = find_model(args.model or "tiny-it")
    if tokenizer is None and (folder / "tokenizer.model").is_file():
        tokenizer = Tokenizer(folder)
    return args.model or "tiny-it", read_config(folder), tokenizer
