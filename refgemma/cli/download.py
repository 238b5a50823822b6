"""Fetch a model from the Hugging Face hub, after showing its licence and its size.

Into the hub's cache, or into a folder with --to; other commands find it there: refgemma chat --model OWNER/NAME.
Run the same command again to resume an interrupted download. Every file is verified.
Exit code 1: the answer was no.

examples:
  refgemma download google/gemma-2b-it
  refgemma download google/gemma-2b-it --to weights/google/gemma-2b-it --yes
"""

from __future__ import annotations

import argparse
import sys

from refgemma.cli.options import add_json
from refgemma.cli.terminal import print_json, progress_bar, size
from refgemma.errors import InputError
from refgemma.hub import Place, choose_place, fetch, look_up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("model", metavar="OWNER/NAME", help="a model of the hub, such as google/gemma-2b-it")
    parser.add_argument("--to", metavar="FOLDER", help="folder to make (default: one in the hub's cache)")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    with progress_bar(f"looking up {args.model}"):
        offer = look_up(args.model)
    place = choose_place(offer, args.to)
    missing = place.missing
    print(_summary(place), file=sys.stderr)
    if missing and not (args.yes or _agreed(f"fetch {size(missing)}? [y/N] ")):
        print("nothing was fetched", file=sys.stderr)
        return 1
    try:
        folder = fetch(place, progress_bar)
    except KeyboardInterrupt:
        below = "\n" if sys.stderr.isatty() else ""  # the terminal shows ^C
        print(f"{below}refgemma: stopped; the same command resumes it", file=sys.stderr)
        raise
    if args.json:
        files = [{"name": file.name, "size": file.size, "hash": file.digest} for file in offer.files]
        about = {"model": offer.name, "revision": offer.commit, "licence": offer.licence, "terms": offer.terms}
        print_json(about | {"folder": str(folder), "fetched": missing, "files": files})
    else:
        print(folder)
    return 0


def _summary(place: Place) -> str:
    offer, parameters = place.offer, place.offer.config.num_parameters
    arrived = offer.nbytes - place.missing
    there = f", {size(arrived)} of it already here" if arrived else ""
    return "\n".join(
        (
            f"{offer.name}, revision {offer.commit}",
            f"  licence  {offer.licence}{', to be accepted at the hub' if offer.gated else ''}: {offer.terms}",
            f"  size     {size(offer.nbytes)} in {len(offer.files)} files{there}",
            f"  memory   {size(2 * parameters)} with --weights bfloat16, {size(4 * parameters)} with float32",
            f"  to       {place.folder}",
        )
    )


def _agreed(question: str) -> bool:
    """Whether the next line of standard input says yes."""
    print(question, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise InputError("no answer: answer y on standard input, or pass --yes")
    return line.strip().lower() in ("y", "yes")
