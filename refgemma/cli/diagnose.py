"""Name the known bugs that reproduce what another engine computed.

CANDIDATE is a trace, as for `refgemma compare`; final logits alone are enough. The reference is
run with every known bug in turn, and with two at once where no single one explains everything.
The formula models (reveal-gqa, reveal-mqa, reveal-lora, reveal-far) need no download: their weights are a formula.
Exit code 1 if something is wrong, whether a cause is found or not.

examples:
  refgemma diagnose candidate.safetensors --model tiny-it
  refgemma diagnose logits.npy --model reveal-gqa
  refgemma diagnose candidate.npz --model weights/gemma-2b --arithmetic bfloat16 --no-pairs --json
"""

from __future__ import annotations

import argparse

from refgemma import oracle
from refgemma.cli.compare import add_candidate, read_mapping
from refgemma.cli.options import add_json
from refgemma.cli.terminal import print_json, progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    add_candidate(parser, "tiny-it")
    parser.add_argument("--no-pairs", action="store_true", help="do not try pairs of bugs, which takes longest")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    mapping = read_mapping(args.map)
    with progress_bar(f"trying known bugs on {args.candidate}") as progress:
        found = oracle.diagnose(
            args.candidate,
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
