"""Where a record of decisions goes: a file to read again, a page, a picture; `sample` and `generate` share it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

from refgemma.cli.files import check_apart
from refgemma.cli.terminal import progress_bar
from refgemma.files.atomic import check_file_place, whole_file
from refgemma.files.pictures import picture_format
from refgemma.sampling import Record, show
from refgemma.sampling.record_file import logits_file_of

Save: TypeAlias = Callable[[Record, str, int | None], None]


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where a record goes."""
    group = parser.add_argument_group("the record of every decision")
    group.add_argument(
        "--record", metavar="FILE.jsonl", help="save it, to be replayed by `refgemma sample`; logits go beside it"
    )
    group.add_argument("--page", metavar="FILE.html", help="save it as a page: click a token to see why")
    group.add_argument("--picture", metavar="FILE.png|.svg|.pdf", help="save it as a picture")


def wanted(args: argparse.Namespace) -> bool:
    """Whether a record is to go anywhere."""
    return bool(args.record or args.page or args.picture)


@contextmanager
def outputs(args: argparse.Namespace) -> Iterator[Save]:
    """Open the files, so that a place that cannot be written to is known before the work is done."""
    _check_files(args)
    form = picture_format(args.picture) if args.picture else None
    if args.record:
        check_file_place(args.record)
        check_file_place(logits_file_of(Path(args.record)))
    with ExitStack() as stack:
        page = stack.enter_context(whole_file(args.page, devices=True)) if args.page else None
        picture = stack.enter_context(whole_file(args.picture, devices=True)) if args.picture else None

        def save(record: Record, title: str, t: int | None) -> None:
            if args.record:
                record.save(args.record)
            if page is not None:
                with progress_bar("writing the page") as progress:
                    page.write(show.page(record, title=title, progress=progress).encode("ascii"))
            if picture is not None and form is not None:
                with progress_bar("drawing the picture"):
                    picture.write(show.picture(record, t, format=form))

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
