"""The program: which subcommands there are, and the one place where an error becomes a sentence and an exit code.

0: success. 1: the check failed. 2: usage error. 70: a bug in refgemma. 130: stopped by Ctrl-C. 141: the reader of the
output closed it.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import refgemma
from refgemma.cli import (
    bench,
    chat,
    compare,
    diagnose,
    download,
    generate,
    inspect,
    logits,
    merge,
    sample,
    score,
    serve,
    trace,
    vectors,
    verify,
)
from refgemma.errors import InputError

# Each has a docstring that is its help, `add_arguments` and `run`.
COMMANDS: tuple[ModuleType, ...] = (
    generate,
    chat,
    logits,
    score,
    sample,
    trace,
    compare,
    diagnose,
    verify,
    vectors,
    merge,
    inspect,
    download,
    serve,
    bench,
)

BAD_USE = 2
BUG = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 128 + 2  # by SIGINT, as shells count
READER_GONE = 128 + 13  # by SIGPIPE
_REPORT = (
    f"this is a bug in refgemma {refgemma.__version__}, not in your input; please report the command and the lines "
    "above (CONTRIBUTING.md says where)"
)


class Parser(argparse.ArgumentParser):
    """Parser whose errors are errors like any other."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below its usage."""
        raise InputError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal cannot show must not end the program
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning
        try:
            code = _run(argv)
            sys.stdout.flush()  # here, where a failure still has an ear, and not at exit
        except KeyboardInterrupt:
            if sys.stdout.isatty():
                print()
            return INTERRUPTED
        except BrokenPipeError:
            _settle_stdout()
            return READER_GONE
        except (InputError, OSError, MemoryError) as error:
            print(f"refgemma: {sentence(error)}", file=sys.stderr)
            _settle_stdout()
            return BAD_USE
        except Exception:
            traceback.print_exc()
            print(f"refgemma: {_REPORT}", file=sys.stderr)
            _settle_stdout()
            return BUG
    return code


def build_parser() -> Parser:
    """Build the parser of all subcommands."""
    parser = Parser("refgemma", description=refgemma.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"refgemma {refgemma.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    for module in COMMANDS:
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def sentence(error: BaseException) -> str:
    """Say an error in one sentence."""
    if isinstance(error, MemoryError):
        return f"out of memory ({error}): --weights bfloat16 takes the least, `refgemma inspect` tells how much"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'standard output'}: {error.strerror.lower()}"
    return str(error)


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        return BAD_USE
    if importlib.util.find_spec("rich") is None:
        raise InputError('the command line draws with rich, which is not installed: pip install "refgemma[cli]"')
    code: int = args.run(args)
    return code


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line for a warning, without the place in the code."""
    print(f"refgemma: warning: {message}", file=sys.stderr)


def _open_closed_streams() -> None:
    """Put /dev/null where the shell closed a stream (``<&-``): Python has None there, which nothing reads or writes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  open until the program ends


def _settle_stdout() -> None:
    """Write what is still buffered, or let it go nowhere: Python would fail on it once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
