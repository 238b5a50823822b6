"""What several subcommands share: options for a model, a prompt, sampling and records, and reading their text."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

from refgemma.cli.terminal import progress_bar
from refgemma.device import DEVICES
from refgemma.errors import InputError
from refgemma.files.atomic import check_file_place, whole_file
from refgemma.files.pictures import picture_format
from refgemma.gemma import Gemma, Prompt, load
from refgemma.numerics import PROFILES
from refgemma.sampling import Record, SamplingParams, show
from refgemma.sampling.record_file import logits_file_of
from refgemma.text import chat

Save: TypeAlias = Callable[[Record, str, int | None], None]
T = TypeVar("T")


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


# Name, parser of its argument, name of that in help, effect.
_SAMPLING = (
    ("logit_bias", _bias, "ID:X", "added to the logit of this token; may be given several times"),
    ("banned", token_ids, "IDS", "tokens that may not be chosen"),
    (
        "repetition_penalty",
        float,
        "X",
        "divides positive logits of tokens that occurred, multiplies negative ones",
    ),
    ("frequency_penalty", float, "X", "subtracted per occurrence of a token in the output"),
    ("presence_penalty", float, "X", "subtracted once from each token that has occurred in the output"),
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
        add_formats(group, "as --numerics")
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


def add_formats(parser: argparse._ActionsContainer, default: str) -> None:
    """Add the options for the formats of weights and arithmetic; `default` describes that of the weights."""
    parser.add_argument(
        "--weights",
        choices=("bfloat16", "float32", "float64"),
        help=f"how matrices stay in memory (default: {default})",
    )
    parser.add_argument(
        "--numerics", choices=tuple(PROFILES), default="float32", help="arithmetic of activations (default: float32)"
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


def add_prompt(parser: argparse.ArgumentParser, *, tokens: bool = False) -> None:
    """Add the arguments that give a prompt, or token ids in place of it."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="one user turn; - reads standard input")
    parser.add_argument(
        "--messages", metavar="FILE", help='a conversation, JSON: [{"role": "user", "content": "Hi"}, ...]'
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="take PROMPT literally: no chat template, control text such as <eos> is parsed",
    )
    if tokens:
        parser.add_argument(
            "--tokens", type=token_ids, metavar="IDS", help="token ids, such as 2,106,1645, in place of a prompt"
        )


def read_prompt_or_tokens(args: argparse.Namespace) -> Prompt:
    """Read the prompt; empty where token ids were given."""
    if args.tokens is None:
        return read_prompt(args)
    if args.prompt is not None or args.messages is not None or args.raw:
        raise InputError("--tokens was given with a prompt: expected one of the two")
    return ""


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
    messages = read_json(args.messages, list, 'expected a list of messages, [{"role": "user", "content": "..."}, ...]')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shown when the messages are used
            chat.render(messages)
    except InputError as error:
        raise InputError(f"{args.messages}: {error}") from None
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


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where a record goes."""
    group = parser.add_argument_group("the record of every decision")
    group.add_argument(
        "--record", metavar="FILE.jsonl", help="save it, to be replayed by `refgemma sample`; logits go beside it"
    )
    group.add_argument("--page", metavar="FILE.html", help="save it as a page: click a token to see why")
    group.add_argument("--picture", metavar="FILE.png|.svg|.pdf", help="save it as a picture")


def wants_record(args: argparse.Namespace) -> bool:
    """Whether a record was asked for."""
    return bool(args.record or args.page or args.picture)


def output_file(path: str | None) -> AbstractContextManager[IO[bytes] | None]:
    """Open the file that an option names, if any."""
    return whole_file(path, devices=True) if path else nullcontext()


@contextmanager
def picture_file(path: str | None) -> Iterator[Callable[[Callable[[str], bytes]], None]]:
    """Open the file of ``--picture``, if any; yields what saves the picture that a function draws in a format."""
    form = picture_format(path) if path else None
    with output_file(path) as file:

        def save(draw: Callable[[str], bytes]) -> None:
            if file is not None and form is not None:
                file.write(draw(form))

        yield save


@contextmanager
def outputs(args: argparse.Namespace) -> Iterator[Save]:
    """Open the files before the work begins, so that one that cannot be written is reported at once."""
    _check_files(args)
    if args.record:
        check_file_place(args.record)
        check_file_place(logits_file_of(Path(args.record)))
    with picture_file(args.picture) as save_picture, output_file(args.page) as page:

        def save(record: Record, title: str, t: int | None) -> None:
            if args.record:
                record.save(args.record)
            if page is not None:
                with progress_bar("writing the page") as progress:
                    page.write(show.page(record, title=title, progress=progress).encode("ascii"))
            if args.picture:
                with progress_bar("drawing the picture"):
                    save_picture(lambda form: show.picture(record, t, format=form))

        yield save


def _check_files(args: argparse.Namespace) -> None:
    """Refuse to write over what is read, and to write two things to one place."""
    read: dict[str, str | Path | None] = {
        "LOGITS": getattr(args, "logits", None),
        "--replay": getattr(args, "replay", None),
        "--tokenizer": getattr(args, "tokenizer", None),
        "--messages": getattr(args, "messages", None),
    }
    if read["--replay"] is not None:
        read["the logits of --replay"] = _logits_of(Path(read["--replay"]))
    written: dict[str, str | Path | None] = {
        "--record": args.record,
        "the logits beside --record": logits_file_of(Path(args.record)) if args.record else None,
        "--page": args.page,
        "--picture": args.picture,
        "--output": getattr(args, "output", None),
    }
    check_apart(read, written)


def _logits_of(record: Path) -> Path | None:
    """Where the logits of a record are; None if the record is not sound, which its reader reports."""
    try:
        with record.open("rb") as file:
            return record.with_name(json.loads(file.readline())["logits"]["file"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def read_text(path: str) -> str:
    """Read a text exactly, its last newline included."""
    if path == "-":
        return decode(sys.stdin.buffer.read(), "standard input")
    try:
        return decode(Path(path).read_bytes(), path)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from None


def read_json(path: str, kind: type[T], wanted: str) -> T:
    """Read a JSON value of one kind; `wanted` ends the error where it is something else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): {wanted}") from None
    if not isinstance(value, kind):
        raise InputError(f"{path} holds {value!r:.40}: {wanted}")
    return value


def text_argument(text: str) -> str:
    """Decode an argument as UTF-8, whatever the locale."""
    return decode(os.fsencode(text), "the argument")


def decode(data: bytes, source: str) -> str:
    """Decode UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; expected text in UTF-8"
        ) from None


def check_apart(read: Mapping[str, str | Path | None], written: Mapping[str, str | Path | None]) -> None:
    """Refuse to write one file twice, or one that is read."""
    files = [(what, Path(path)) for what, path in (*written.items(), *read.items()) if path is not None]
    for (what, path), (other, elsewhere) in combinations(files, 2):
        if what in written and _same_file(path, elsewhere):
            raise InputError(f"{what} and {other} are the same file, {path}: expected a file of its own for each")


def _same_file(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():  # links, and file systems that ignore case
        return one.is_file() and one.samefile(other)
    return one.resolve() == other.resolve()
