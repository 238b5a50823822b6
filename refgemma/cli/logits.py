"""Show which tokens the model expects next, or save the logits of every position.

examples:
  refgemma logits "What is 17 + 25?"
  refgemma logits --raw "The capital of France is" --top 5
  refgemma logits --tokens 2,106,1645 --output logits.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
import safetensors.numpy

from refgemma.cli.options import (
    add_json,
    add_model,
    add_prompt,
    check_apart,
    load_model,
    output_file,
    read_prompt_or_tokens,
)
from refgemma.cli.terminal import print_json, print_table, progress_bar, visible
from refgemma.errors import InputError
from refgemma.gemma import Gemma
from refgemma.numerics import Array
from refgemma.sampling import SamplingParams, decide

Save: TypeAlias = Callable[[IO[bytes], Array, Array], object]

_SHOWN = 8  # tokens of the prompt
_FORMATS: dict[str, Save] = {
    ".npy": lambda file, logits, tokens: np.save(file, logits),
    ".npz": lambda file, logits, tokens: np.savez(file, logits=logits, tokens=tokens),
    ".safetensors": lambda file, logits, tokens: file.write(
        safetensors.numpy.save({"logits": logits, "tokens": tokens})
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    add_prompt(parser, tokens=True)
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many tokens to show (default: 10)")
    parser.add_argument(
        "--output",
        metavar="FILE.npy|.npz|.safetensors",
        help="save the logits of every position, shape (T, V); all but .npy also hold the tokens",
    )
    add_json(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.top < 1:
        raise InputError(f"--top is {args.top}: expected a whole number of at least 1")
    save = _format_of(args.output) if args.output else None
    check_apart({"--messages": args.messages}, {"--output": args.output})
    prompt = read_prompt_or_tokens(args)
    with output_file(args.output) as file:
        gemma = load_model(args)
        tokens = gemma.encode_prompt(prompt, raw=args.raw) if args.tokens is None else list(args.tokens)
        with progress_bar(f"reading {len(tokens)} tokens") as progress:
            if file is not None and save is not None:
                logits = gemma.logits(tokens, progress=progress)
                save(file, logits, np.array(tokens))
                last = logits[-1]
            else:
                last = gemma.logits(tokens, last=True, progress=progress)
    probs = decide(last, SamplingParams(temperature=1.0)).probs
    ids = [int(i) for i in np.argsort(-last, kind="stable")[: args.top]]
    rows = [(i, _piece(gemma, i), float(last[i]), float(probs[i])) for i in ids]
    if args.json:
        top = [dict(zip(("id", "piece", "logit", "probability"), row, strict=True)) for row in rows]
        print_json({"model": args.model, "tokens": tokens, "top": top})
        return 0
    print(f"{len(tokens)} tokens, the last of them:", *(visible(_piece(gemma, i)) for i in tokens[-_SHOWN:]))
    print_table(
        ("id", "piece", "logit", "probability"),
        [(str(i), visible(piece), f"{logit:.6f}", f"{prob:.6g}") for i, piece, logit, prob in rows],
        title="next",
        text=(1,),
    )
    return 0


def _piece(gemma: Gemma, token: int) -> str:
    """Name of a token; empty for rows of the embedding table beyond the tokenizer."""
    return gemma.tokenizer.piece(token) if token < gemma.tokenizer.vocab_size else ""


def _format_of(path: str) -> Save:
    ending = Path(path).suffix
    if ending not in _FORMATS:
        raise InputError(f"{path} ends in {ending or 'nothing'!r}: expected {', '.join(_FORMATS)}")
    return _FORMATS[ending]
