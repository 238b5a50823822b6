"""Talk with the model, turn by turn.

A line is a turn; lines may also come from a file or another program.
Commands: /reset begins a new conversation, /help explains, /exit ends.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import suppress

from refgemma.cache import PrefixCache
from refgemma.cli.generate import answer, report
from refgemma.cli.options import add_model, add_sampling, decode, load_model, sampling_settings, text_argument
from refgemma.cli.terminal import print_json
from refgemma.errors import InputError

_HELP = "/reset begins a new conversation, /exit or Ctrl-D ends, Ctrl-C ends even in the middle of an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("--system", metavar="TEXT", help="a system message before the first turn")
    parser.add_argument("--verbose", action="store_true", help="print counts, times and the seed of each answer")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each answer, for programs")
    add_sampling(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    settings = sampling_settings(args)
    beginning = [] if args.system is None else [{"role": "system", "content": text_argument(args.system)}]
    gemma = load_model(args)
    messages = list(beginning)
    prefix = PrefixCache()
    for line in _lines(f"Talking with {args.model}; /help explains."):
        match line.strip():
            case "":
                continue
            case "/exit":
                break
            case "/reset":
                messages = list(beginning)
                _say("a new conversation")
                continue
            case "/help":
                _say(_HELP)
                continue
            case word if re.fullmatch(r"/\w+", word):
                _say(f"unknown command {word}: {_HELP}")
                continue
        turn = {"role": "user", "content": line}
        try:
            result = answer(
                gemma, [*messages, turn], settings, aloud=not args.json, prefix=prefix, verbose=args.verbose
            )
        except InputError as error:
            _say(f"refgemma: {error}; this turn is left out, /reset begins a new conversation")
            continue
        messages += [turn, {"role": "assistant", "content": result.text}]
        if args.json:
            print_json(report(result, args.model))
    return 0


def _lines(greeting: str) -> Iterator[str]:
    """Turns of the user, typed or piped in."""
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            yield decode(line, "standard input").rstrip("\r\n")
        return
    with suppress(ImportError):  # missing on some systems
        import readline  # noqa: F401 - gives input() line editing and a history
    _say(greeting)
    prompt = "> " if sys.stdout.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print()
            return


def _say(text: str) -> None:
    """Print what is not the model's, on standard error."""
    print(text, file=sys.stderr)
