"""What holds for every subcommand: bad use is one sentence and exit code 2, whatever the terminal, and no traceback."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest

import refgemma
from refgemma.cli import main
from refgemma.cli.program import COMMANDS
from refgemma.sampling import SamplingParams

NAMES = [module.__name__.rpartition(".")[2] for module in COMMANDS]


def in_process_of_its_own(*arguments, **options):
    """The program as a shell runs it; variables in `environment` are added to those that are set."""
    environment = os.environ | options.pop("environment", {})
    command = [sys.executable, "-m", "refgemma", *map(str, arguments)]
    return subprocess.run(command, env=environment, check=False, **{"capture_output": True, **options})


def file_with(folder, name, text):
    path = folder / name
    path.write_bytes(text)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["generate"], "no prompt was given: expected PROMPT, - for standard input, or --messages FILE"),
        (["generate", "hello", "--messages", "x.json"], "PROMPT and --messages were both given"),
        (["generate", "--raw", "--messages", "x.json"], "--raw and --messages were both given"),
        (["generate", "hello", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["generate", "hello", "--temp", "1"], "unrecognized arguments: --temp"),
        (["generate", "hello", "--temperature", "warm"], "argument --temperature: invalid float value: 'warm'"),
        (["generate", "hello", "--temperature", "nan"], "temperature is nan: expected a finite number"),
        (["generate", "hello", "--top-p", "2"], "top_p is 2.0"),
        (["generate", "hello", "--stop", ""], "none of them empty"),
        (["generate", "hello", "--weights", "int4"], "argument --weights: invalid choice: 'int4'"),
        (["generate", "hello", "--weights", "float64"], "weights are 'float64', wider than the arithmetic"),
        (["generate", "hello " * 100], "shorten it"),
        (["generate", "--messages", "absent.json"], "cannot read absent.json: No such file or directory"),
        (["chat", "--max-tokens", "0"], "max_tokens is 0"),
        (["score", "--file", "."], "cannot read .: "),
    ],
)
def test_bad_use_is_one_sentence(run, arguments, words):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("refgemma: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b'[{"role": "user"',
            "is not valid JSON (Expecting ',' delimiter: line 1 column 17 (char 16)): expected a list",
        ),
        (b'{"role": "user", "content": "hello"}', "holds {'role': 'user', 'content': 'hello'}: expected a list"),
        (b'"hello"', "holds 'hello': expected a list"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[3]", "messages[0] is 3"),
        (b'[{"role": "user", "content": 3}]', "messages[0]: content is 3"),
        (b'[{"role": "user", "content": "\\ud83d"}]', "half a surrogate pair"),
        (b'[{"role": "user", "content": "\xff"}]', "is not UTF-8: byte 30 is 0xff"),
    ],
)
def test_a_bad_conversation_is_one_sentence(run, tmp_path, content, words):
    code, out, err = run("generate", "--messages", file_with(tmp_path, "m.json", content))
    assert (code, out) == (2, "")
    assert err.startswith("refgemma: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "chat", "logits", "score", "inspect"])
def test_a_bad_model_is_one_sentence(capsys, type_in, tmp_path, command):
    text = ["hello"] if command in ("generate", "logits", "score") else []
    (tmp_path / "config.json").write_text("{")
    file = file_with(tmp_path, "file", b"")
    for model, words in [
        ("absent", "no model 'absent'"),
        (tmp_path, "is not valid JSON"),
        (file, "is a file"),
        ("", "the model name is empty"),
    ]:
        type_in(b"hello\n")
        assert main([command, *text, "--model", str(model)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("refgemma: ")
        assert words in err
        assert err.count("\n") == 1


def test_each_subcommand_is_here_and_has_its_help(capsys):
    for name in NAMES:
        with pytest.raises(SystemExit, match=r"^0$"):
            main([name, "--help"])
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: refgemma {name} ")
        assert "--json" in shown
        assert "--model" in shown or name in {
            "bench",
            "download",
            "merge",
            "sample",
        }  # which are about no model of this machine
        if name in ("generate", "chat"):
            for field in fields(SamplingParams):
                assert f"--{field.name.replace('_', '-')} " in shown


def test_no_subcommand_shows_what_there_is(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(f"\n    {name} " in err for name in NAMES)


def test_without_rich(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = run("inspect")
    assert (code, out) == (2, "")
    assert 'pip install "refgemma[cli]"' in err


def test_ctrl_c_keeps_what_was_printed(run, monkeypatch):
    def stream(self, prompt, **options):
        yield refgemma.Event(text="half an ans", token=0, row=0, decision=None)
        raise KeyboardInterrupt

    monkeypatch.setattr(refgemma.Gemma, "stream", stream)
    assert run("generate", "hello") == (130, "half an ans", "")


def test_out_of_memory(run, monkeypatch):
    def load(*_, **__):
        raise MemoryError("Unable to allocate 16.0 GiB")

    monkeypatch.setattr("refgemma.cli.options.load", load)
    code, out, err = run("score", "hello")
    assert (code, out) == (2, "")
    assert "Unable to allocate 16.0 GiB" in err
    assert "--weights bfloat16" in err


@pytest.mark.parametrize("error", [ValueError("operands could not be broadcast"), TypeError("x"), KeyError("layers")])
def test_a_bug_shows_itself_as_one(run, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(refgemma.Gemma, "stream", fail)
    code, out, err = run("generate", "hello")
    assert (code, out) == (70, "")
    assert "Traceback" in err
    assert str(error) in err
    assert re.search("this is a bug in refgemma .*CONTRIBUTING.md", err.splitlines()[-1])


def test_a_warning_is_one_line(run):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, out, err = run("generate", "<bos>hello", "--max-tokens", "1")
    assert code == 0
    assert out
    assert err.startswith("refgemma: warning: messages[0] begins with <bos>")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["generate", "hello"], ["inspect"], ["score", "hello"], ["logits", "hello"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])  # then every write meets the closed pipe, not only the last flush
def test_a_reader_that_goes_away_ends_it_quietly(folder, arguments, unbuffered):
    command = [sys.executable, "-m", "refgemma", *arguments, "--model", str(folder)]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_an_empty_one(folder, closed):
    """Where the shell closes a stream, Python has None in its place."""
    command = shlex.join([sys.executable, "-m", "refgemma", "generate", "hello", "--model", str(folder)])
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run(["sh", "-c", f"{command} --temperature -1 {closed}"], capture_output=True)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full, /dev/full")
def test_a_full_disk_is_one_sentence(folder):
    with Path("/dev/full").open("wb") as full:
        done = in_process_of_its_own(
            "generate", "hello", "--model", folder, capture_output=False, stdout=full, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (2, b"refgemma: standard output: no space left on device\n")


@pytest.mark.parametrize("command", ["generate", "logits", "score"])
def test_a_terminal_that_knows_ascii_only(folder, command):
    text = "h\u00e9llo \U0001f600"
    options = ["--raw", "--temperature", "9", "--seed", "3"] if command == "generate" else []
    done = in_process_of_its_own(command, text, "--model", folder, *options, environment={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    assert rb"\u" in done.stdout  # something had to be written otherwise


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are not bytes there")
def test_an_argument_is_utf8_in_every_locale(run, folder):
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = in_process_of_its_own("score", "h\u00e9llo", "--json", "--model", folder, environment=ascii_locale)
    assert json.loads(done.stdout)["tokens"] == json.loads(run("score", "h\u00e9llo", "--json")[1])["tokens"]
    code, out, err = run("score", os.fsdecode(b"\xff"))
    assert (code, out) == (2, "")
    assert "the argument is not UTF-8" in err


def test_the_version():
    assert in_process_of_its_own("--version").stdout.split() == [b"refgemma", refgemma.__version__.encode()]
