"""One answer, said as it comes or waited for; `generate` gives one, `chat` many."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

from refgemma.checkpoint.load import Progress
from refgemma.cli.terminal import progress_bar
from refgemma.gemma import Gemma, Prompt
from refgemma.generation import Generation
from refgemma.prefix_cache import PrefixCache


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
    """Answer a prompt."""
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
    """One line of counts; the first token belongs to the reading, which computes it."""
    later = result.usage.completion_tokens - 1
    rate = f", {later / writing:.1f} tokens/s" if later and writing else ""
    return (
        f"prompt: {result.usage.prompt_tokens} tokens, first token after {reading:.2f} s;"
        f" answer: {later + 1} tokens{rate}; end: {result.finish_reason}; --seed {result.seed}"
    )
