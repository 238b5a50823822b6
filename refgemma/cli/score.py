"""Show how likely the model finds a text, token by token.

The text is taken exactly, a final newline included; <bos> goes before it.

examples:
  refgemma score "The cat sat on the mat."
  refgemma score --file book.txt --json
"""

from __future__ import annotations

import argparse
import math
from typing import get_args

from refgemma.cli.options import add_json, add_model, load_model, read_text, text_argument
from refgemma.cli.terminal import print_json, print_table, progress_bar, visible
from refgemma.errors import InputError
from refgemma.gemma import Score
from refgemma.text.tokenizer import Control


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to score; - reads standard input")
    parser.add_argument("--file", metavar="FILE", help="score the text in this file")
    parser.add_argument(
        "--control",
        choices=get_args(Control),
        default="none",
        help="control text to parse: none, markers like <start_of_turn>, or all (default: none)",
    )
    add_json(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if (args.text is None) == (args.file is None):
        given = "no text was given" if args.text is None else "TEXT and --file were both given"
        raise InputError(f"{given}: expected TEXT, - for standard input, or --file FILE")
    source = args.text if args.file is None else args.file
    text = text_argument(args.text) if args.file is None and args.text != "-" else read_text(source)
    gemma = load_model(args)
    with progress_bar("reading the text", "tokens") as progress:
        score = gemma.score(text, control=args.control, progress=progress)
    if not len(score.logprobs):
        raise InputError("the text is empty: expected at least one token to score")
    figures = _figures(score, len(text.encode()))
    pieces = [gemma.tokenizer.piece(token) for token in score.tokens[1:]]
    if args.json:
        shown = {"model": args.model, "tokens": score.tokens, "pieces": ["<bos>", *pieces]}
        print_json(shown | {"logprobs": score.logprobs.tolist()} | figures)
        return 0
    rows = [
        (str(token), visible(piece), f"{logprob:.4f}")
        for token, piece, logprob in zip(score.tokens[1:], pieces, score.logprobs, strict=True)
    ]
    print_table(("id", "piece", "log probability"), rows, text=(1,))
    print_table(
        ("", ""),
        [
            (name.removeprefix("num_").replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:,.4f}")
            for name, value in figures.items()
        ],
        title="in all",
        text=(0,),
    )
    return 0


def _figures(score: Score, num_bytes: int) -> dict[str, float]:
    """Natural logs summed and averaged, in the units people quote."""
    count = len(score.logprobs)
    nats = -score.total / count
    return {
        "total": score.total,
        "num_tokens": count,
        "num_bytes": num_bytes,
        "nats_per_token": nats,
        "bits_per_token": nats / math.log(2),
        "bits_per_byte": -score.total / math.log(2) / num_bytes,
        "perplexity": math.exp(nats) if nats < 700 else math.inf,
    }
