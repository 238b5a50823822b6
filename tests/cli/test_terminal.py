"""What the terminal shows, and what programs read."""

import io
import json
import sys

import pytest

from refgemma.cli import terminal


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self):
        return True


class AtOnce:
    """A timer that does not wait, so that the test need not either."""

    def __init__(self, delay, function):
        self.function = function

    def start(self):
        self.function()

    def cancel(self):
        pass

    def join(self):
        pass


def test_a_progress_bar_at_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal.threading, "Timer", AtOnce)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with terminal.progress_bar("loading [b]it[/b]") as progress:
        progress(3, 10)
    shown = sys.stderr.getvalue()
    assert "loading [b]it[/b]" in shown  # no markup
    assert " 30%" in shown
    assert shown.endswith("\x1b[2K")  # and the line is wiped


def test_a_progress_bar_tells_the_rate_of_what_it_counts(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal.threading, "Timer", AtOnce)
    for unit, words in (("tokens", "tokens/s"), ("", "/s")):
        monkeypatch.setattr(sys, "stderr", Terminal())
        with terminal.progress_bar("reading", unit) as progress:
            progress(3, 10)
            progress(7, 10)
        assert (words in sys.stderr.getvalue()) is bool(unit)


def test_no_bar_for_work_that_takes_a_moment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with terminal.progress_bar("loading") as progress:
        progress(3, 10)
    assert "loading" not in sys.stderr.getvalue()


def test_no_bar_where_nobody_looks(capsys):
    with terminal.progress_bar("loading") as progress:
        assert progress is None
    assert capsys.readouterr() == ("", "")


def test_a_table_takes_texts_as_they_are(capsys):
    terminal.print_table(("name", "n"), [("[red]:smile:[/red]" + "x" * 300, "7")], text=(0,))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # nothing is folded where the output is no terminal
    assert lines[1].split() == ["[red]:smile:[/red]" + "x" * 300, "7"]


def test_json_is_ascii_and_finite():
    text = terminal.to_json({"a": [1.5, float("nan"), -float("inf")], "b": "\u2581h\u00e9"})
    assert text.isascii()
    assert json.loads(text) == {"a": [1.5, None, None], "b": "\u2581h\u00e9"}


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (2**20, "1.00 MiB"),
        (5_012_344_832, "4.67 GiB"),
        (2**41, "2,048 GiB"),
    ],
)
def test_sizes(nbytes, text):
    assert terminal.size(nbytes) == text


def test_invisible_characters_are_escaped():
    assert terminal.visible("\u2581h\u00e9\n\x1b[2J\u200b") == "\u2581h\u00e9\\n\\x1b[2J\\u200b"
