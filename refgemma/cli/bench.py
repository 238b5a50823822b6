"""Measure speed and memory with random weights, beside transformers and the limits of the machine.

Writes a checkpoint to a temporary folder (--keep keeps it), and runs a process for each engine, in turn, round by
round, for at most 25 minutes. Run nothing else meanwhile.

examples:
  refgemma bench
  refgemma bench --weights bfloat16 --no-peers --rounds 1
  refgemma bench --size gemma-7b --weights bfloat16 --keep ~/models --picture roofline.png
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack

from refgemma.bench import report
from refgemma.bench.machine import machine
from refgemma.bench.run import LONGEST, SHAPES, check_memory, checkpoint, peers_installed
from refgemma.bench.run import run as run_rounds
from refgemma.cli.options import add_json, picture_file
from refgemma.cli.terminal import print_json, print_table, progress_bar
from refgemma.errors import InputError

_WEIGHTS = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("--size", choices=tuple(SHAPES), default="gemma-2b", help="whose shape (default: gemma-2b)")
    parser.add_argument(
        "--weights",
        type=_formats,
        default=_WEIGHTS,
        metavar="FORMATS",
        help="how matrices stay in memory, float32, bfloat16 or both (default: float32,bfloat16)",
    )
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        help="measure transformers as well (default: if it is installed)",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="at most this many (default: 3)")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the weights there, and find them there next time")
    parser.add_argument("--picture", metavar="FILE.png|.svg|.pdf", help="draw the roofline")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.rounds < 1:
        raise InputError(f"--rounds is {args.rounds}: expected at least 1")
    if args.peers and not peers_installed():
        raise InputError('--peers measures transformers, which is not installed: pip install "refgemma[peers]"')
    config = SHAPES[args.size]
    peers = peers_installed() if args.peers is None else args.peers
    check_memory(config, args.weights)
    about = machine()
    start = time.monotonic()
    with ExitStack() as stack:
        save_picture = stack.enter_context(picture_file(args.picture))
        with progress_bar(f"making random weights of {args.size}") as progress:
            folder = stack.enter_context(checkpoint(args.size, args.keep, progress))
        with progress_bar("measuring") as progress:
            longest = LONGEST - (time.monotonic() - start)
            rounds = run_rounds(
                folder, weights=args.weights, peers=peers, rounds=args.rounds, longest=longest, progress=progress
            )
        found = report.summary(args.size, config, args.weights, about, rounds)
        save_picture(lambda form: report.picture(found, config, format=form))
    if args.json:
        print_json(found)
        return 0
    for table in report.tables(found):
        text = (0, 1) if not any(table.columns) else (0,)
        print_table(table.columns, table.rows, title=table.title, text=text)
    return 0


def _formats(text: str) -> tuple[str, ...]:
    """Parse the argument of ``--weights``."""
    formats = tuple(dict.fromkeys(text.split(",")))
    if not set(formats) <= set(_WEIGHTS):
        raise argparse.ArgumentTypeError(f"expected float32, bfloat16 or float32,bfloat16, not {text!r}")
    return formats
