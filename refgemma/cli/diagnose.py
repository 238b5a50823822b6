"""Name the known bugs that reproduce what another engine computed.

THEIRS is a trace of ours or of another engine, as for `refgemma compare`; final logits alone will do. The reference is
run with every known bug in turn, and with two at once where no single one explains everything.
The revealing models (reveal-gqa, reveal-mqa, reveal-lora, reveal-far) need no download: their weights are a formula.
Exit code 1 if something is wrong, whether a cause is found or not.

examples:
  refgemma diagnose theirs.safetensors --model tiny-it
  refgemma diagnose logits.npy --model reveal-gqa
  refgemma diagnose theirs.npz --model weights/gemma-2b --arithmetic bfloat16 --no-pairs --json
"""

from __future__ import annotations

import argparse

from refgemma import oracle
from refgemma.cli.compare import read_mapping
from refgemma.cli.options import add_json, token_ids
from refgemma.cli.terminal import print_json, progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("theirs", metavar="THEIRS", help="what the other engine computed")
    parser.add_argument(
        "--model",
        default="tiny-it",
        help="folder, shipped name, hub id fetched before, or revealing model (default: tiny-it)",
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="DIR[:SCALE]", help="an adapter that the model ran with"
    )
    parser.add_argument(
        "--arithmetic",
        metavar="NAME",
        help="what THEIRS was computed in: float32, bfloat16, float16, float64, or a profile such as bf16-deepmind"
        " (default: told from its numbers)",
    )
    parser.add_argument(
        "--tokens",
        type=token_ids,
        metavar="IDS",
        help="what was to be fed, such as 2,106,1645, where THEIRS does not say",
    )
    parser.add_argument("--map", metavar="FILE.json", help='names of THEIRS: {"blk.{i}.q": "layers.{i}.attn.q", ...}')
    parser.add_argument("--no-pairs", action="store_true", help="do not try two bugs at once, which takes longest")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    mapping = None if args.map is None else read_mapping(args.map)
    with progress_bar(f"trying known bugs on {args.theirs}") as progress:
        found = oracle.diagnose(
            args.theirs,
            args.model,
            lora=args.lora,
            arithmetic=args.arithmetic,
            pairs=not args.no_pairs,
            mapping=mapping,
            tokens=args.tokens,
            progress=progress,
        )
    if args.json:
        print_json(found.as_dict())
    else:
        print(found.text())
    return 0 if found.ok else 1
