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
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

from refgemma.cache import PrefixCache
from refgemma.checkpoint.load import Progress
from refgemma.cli.options import (
    add_json,
    add_model,
    add_outputs,
    add_prompt,
    add_sampling,
    load_model,
    output_file,
    outputs,
    read_prompt,
    sampling_settings,
    wants_record,
)
from refgemma.cli.terminal import print_json, progress_bar, to_json
from refgemma.gemma import Gemma, Prompt
from refgemma.generation import Generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    add_prompt(parser)
    add_json(parser)
    parser.add_argument("--output", metavar="FILE", help="write the answer there instead of to standard output")
    parser.add_argument("--verbose", action="store_true", help="print counts, times and the seed on standard error")
    add_outputs(parser)
    add_sampling(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    settings = sampling_settings(args)
    prompt = read_prompt(args)
    with outputs(args) as save, output_file(args.output) as file:
        gemma = load_model(args)
        aloud = not args.json and file is None
        record = wants_record(args)
        result = answer(gemma, prompt, settings, aloud=aloud, raw=args.raw, verbose=args.verbose, record=record)
        if file is not None:
            text = to_json(report(result, args.model)) if args.json else result.text
            file.write(text.removesuffix("\n").encode() + b"\n")
        elif args.json:
            print_json(report(result, args.model))
        if result.record is not None:
            save(result.record, args.model, None)
    return 0


def answer(
    gemma: Gemma,
    prompt: Prompt,
    settings: dict[str, Any],
    *,
    aloud: bool,
    raw: bool = False,
    prefix: PrefixCache | None = None,
    verbose: bool = False,
    record: bool = False,
) -> Generation:
    """Answer a prompt, printing the text as it comes if `aloud`; `chat` uses this as well."""
    started = time.perf_counter()
    with progress_bar("reading the prompt", "tokens") as progress:
        events = gemma.stream(prompt, raw=raw, prefix=prefix, progress=progress, record=record, **settings)
        first = next(events)
    read = time.perf_counter()
    waiting: AbstractContextManager[Progress | None] = nullcontext() if aloud else progress_bar("writing the answer")
    with waiting as progress:
        for count, event in enumerate(chain([first], events), start=1):
            if aloud and event.text:
                print(event.text, end="", flush=True)
            if progress is not None:
                progress(count, settings["max_tokens"])
    result = event.result
    assert result is not None, "the last event of a stream holds the result"
    if aloud and not result.text.endswith("\n"):
        print(flush=True)
    if verbose:
        print(_account(result, reading=read - started, writing=time.perf_counter() - read), file=sys.stderr)
    return result


def report(result: Generation, model: str) -> dict[str, Any]:
    """What ``--json`` prints of an answer."""
    usage = result.usage
    return {
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
        "seed": result.seed,
        "model": model,
    }


def _account(result: Generation, *, reading: float, writing: float) -> str:
    """One line of counts; reading the prompt includes computing the first token."""
    later = result.usage.completion_tokens - 1
    rate = f", {later / writing:.1f} tokens/s" if later and writing else ""
    return (
        f"prompt: {result.usage.prompt_tokens} tokens, first token after {reading:.2f} s;"
        f" answer: {later + 1} tokens{rate}; end: {result.finish_reason}; --seed {result.seed}"
    )
