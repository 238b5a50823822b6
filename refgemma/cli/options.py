"""Options that several subcommands share, and what they stand for: a model, a prompt, settings of the sampler."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import fields
from typing import Any

from refgemma.cli.files import read_text, text_argument
from refgemma.cli.terminal import progress_bar
from refgemma.device import DEVICES
from refgemma.errors import InputError
from refgemma.gemma import Gemma, Prompt, load
from refgemma.numerics import PROFILES
from refgemma.sampling import SamplingParams
from refgemma.text import chat


def token_ids(text: str) -> tuple[int, ...]:
    """Parse the argument of an option that takes token ids."""
    try:
        return tuple(int(word) for word in text.strip("[] ").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers, such as 2,106,1645, not {text!r}") from None


def named_folder(text: str) -> tuple[str, str]:
    """Parse the argument of an option that gives something a name."""
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, not {text!r}")
    return name, folder


def _bias(text: str) -> tuple[int, float]:
    """Parse ID:X."""
    token, _, bias = text.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ID:X, such as 107:-2.5, not {text!r}") from None


# Name, what reads its argument, how help calls that, what it does.
_SAMPLING = (
    ("logit_bias", _bias, "ID:X", "added to the logit of this token; may be given several times"),
    ("banned", token_ids, "IDS", "tokens that may not be chosen"),
    (
        "repetition_penalty",
        float,
        "X",
        "divides positive logits of tokens that occurred, multiplies negative ones",
    ),
    ("frequency_penalty", float, "X", "subtracted for every time that a token stands in the output"),
    ("presence_penalty", float, "X", "subtracted once from each token that stands in the output"),
    ("penalty_window", int, "N", "the penalties look back over this many tokens"),
    ("temperature", float, "X", "divides the logits; 0 takes the most likely token"),
    ("top_k", int, "N", "keep this many tokens"),
    ("top_p", float, "X", "keep the most likely tokens up to this share of the probability"),
    ("min_p", float, "X", "keep tokens at least this many times as likely as the most likely one"),
    ("typical_p", float, "X", "keep the tokens nearest to the expected surprise, up to this share of the probability"),
    ("seed", int, "N", "decides the draws; one is drawn by default"),
)


def add_model(parser: argparse.ArgumentParser, *, runs: bool = True) -> None:
    """Add the options that choose a model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default="tiny-it", help="folder, shipped name, or hub id fetched before (default: tiny-it)"
    )
    if runs:
        group.add_argument(
            "--weights",
            choices=("bfloat16", "float32", "float64"),
            help="how matrices stay in memory (default: as --numerics)",
        )
        group.add_argument(
            "--numerics",
            choices=tuple(PROFILES),
            default="float32",
            help="arithmetic of activations (default: float32)",
        )
        group.add_argument(
            "--device", choices=DEVICES, default="cpu", help="where to compute; cuda is an NVIDIA GPU (default: cpu)"
        )
        group.add_argument(
            "--lora",
            action="append",
            default=[],
            metavar="DIR[:SCALE]",
            help="put this LoRA adapter on the model, a folder or a shipped name; may be given several times",
        )


def load_model(args: argparse.Namespace) -> Gemma:
    """Load the chosen model, under a progress bar."""
    with progress_bar(f"loading {args.model}") as progress:
        return load(
            args.model,
            numerics=args.numerics,
            weights=args.weights,
            lora=args.lora,
            device=args.device,
            progress=progress,
        )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option for programs."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that give a prompt."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="one user turn; - reads standard input")
    parser.add_argument(
        "--messages", metavar="FILE", help='a conversation, JSON: [{"role": "user", "content": "Hi"}, ...]'
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="take PROMPT as it stands: no chat template, control text such as <eos> counts",
    )


def read_prompt(args: argparse.Namespace) -> Prompt:
    """Read the prompt, and check it before a model is loaded for it."""
    if (args.prompt is None) == (args.messages is None):
        given = "no prompt was given" if args.prompt is None else "PROMPT and --messages were both given"
        raise InputError(f"{given}: expected PROMPT, - for standard input, or --messages FILE")
    if args.messages is None:
        return read_text("-") if args.prompt == "-" else text_argument(args.prompt)
    if args.raw:
        raise InputError(
            "--raw and --messages were both given: a conversation needs the chat template, leave out --raw"
        )
    messages = _parse_messages(read_text(args.messages), args.messages)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come when the messages are used
            chat.render(messages)
    except (ValueError, TypeError) as error:
        raise InputError(f"{args.messages}: {error}") from None
    return messages


def _parse_messages(text: str, path: str) -> list[Any]:
    wanted = 'expected a list of messages, [{"role": "user", "content": "..."}, ...]'
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): {wanted}") from None
    if not isinstance(messages, list):
        raise InputError(f"{path} holds {messages!r:.40}: {wanted}")
    return messages


def add_sampling(parser: argparse.ArgumentParser, *, generates: bool = True) -> None:
    """Add an option for every field of `SamplingParams`."""
    group = parser.add_argument_group("sampling, in the order of the steps")
    for name, kind, metavar, what in _SAMPLING:
        default = getattr(SamplingParams, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            action="append" if kind is _bias else "store",
            default=(list(default) if kind is _bias else default) if generates else argparse.SUPPRESS,
            metavar=metavar,
            help=what if default in (None, ()) else f"{what} (default: {default:g})",
        )
    if generates:
        longest = SamplingParams.max_tokens
        group.add_argument(
            "--max-tokens", type=int, default=longest, metavar="N", help=f"longest answer (default: {longest})"
        )
        group.add_argument(
            "--stop",
            action="append",
            default=[],
            metavar="TEXT",
            help="end before this text; may be given several times",
        )


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the settings, and check them before a model is loaded for them."""
    settings = {field.name: getattr(args, field.name) for field in fields(SamplingParams) if hasattr(args, field.name)}
    if "stop" in settings:
        settings["stop"] = tuple(text_argument(text) for text in args.stop)
    SamplingParams(**settings)
    return settings
