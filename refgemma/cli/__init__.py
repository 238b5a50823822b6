"""The command ``refgemma``: one file a subcommand, none of which computes anything that the library does not."""

from refgemma.cli.program import main

__all__ = ["main"]
