"""Answer one prompt, or continue a text.

examples:
  refgemma generate "What is 17 + 25?"
  refgemma generate --raw "Once upon a time" --temperature 1 --seed 7
  refgemma generate --messages conversation.json --json
  refgemma generate - < question.txt
  refgemma generate "Tell me a story." --record run.jsonl --page run.html
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

from refgemma.cli.answer import answer, report
from refgemma.cli.look import add_outputs, outputs, wanted
from refgemma.cli.options import (
    add_json,
    add_model,
    add_prompt,
    add_sampling,
    load_model,
    read_prompt,
    sampling_settings,
)
from refgemma.cli.terminal import print_json, to_json
from refgemma.files.atomic import whole_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    add_prompt(parser)
    add_json(parser)
    parser.add_argument("--output", metavar="FILE", help="write the answer there and not to standard output")
    parser.add_argument("--verbose", action="store_true", help="tell counts, times and the seed on standard error")
    add_outputs(parser)
    add_sampling(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    settings = sampling_settings(args)
    prompt = read_prompt(args)
    with outputs(args) as save, whole_file(args.output, devices=True) if args.output else nullcontext() as file:
        gemma = load_model(args)
        aloud = not args.json and file is None
        record = wanted(args)
        result = answer(gemma, prompt, settings, aloud=aloud, raw=args.raw, verbose=args.verbose, record=record)
        if file is not None:
            text = to_json(report(result, args.model)) if args.json else result.text
            file.write(text.removesuffix("\n").encode() + b"\n")
        elif args.json:
            print_json(report(result, args.model))
        if result.record is not None:
            save(result.record, args.model, None)
    return 0
