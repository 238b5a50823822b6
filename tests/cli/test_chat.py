"""`refgemma chat`: turns, commands, and a conversation that survives a bad turn."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

SETTINGS = ("--temperature", "3", "--seed", "7", "--max-tokens", "4")


def user(text):
    return {"role": "user", "content": text}


def test_each_turn_is_asked_with_all_that_went_before(run, type_in, asked):
    type_in(b"hello\n\n  \nworld\n")
    code, out, err = run("chat", *SETTINGS)
    assert (code, err) == (0, "")
    assert [options["prefix"] for _, options in asked] == [asked[0][1]["prefix"]] * 2  # one cache for all turns
    first, second = (prompt for prompt, _ in asked)
    assert first == [user("hello")]
    assert second[0] == user("hello")
    assert second[1]["role"] == "assistant"
    assert second[2:] == [user("world")]
    assert out.startswith(second[1]["content"] + "\n")


def test_the_answers_are_the_library_s(run, type_in, gemma):
    settings = {"temperature": 3.0, "seed": 7, "max_tokens": 4}
    first = gemma.generate([user("hello")], **settings)
    second = gemma.generate([user("hello"), {"role": "model", "content": first.text}, user("world")], **settings)
    type_in(b"hello\nworld\n")
    _, out, _ = run("chat", "--json", *SETTINGS)
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["tokens"] for answer in answers] == [first.tokens, second.tokens]
    assert answers[1]["usage"]["prompt_tokens"] == second.usage.prompt_tokens


def test_commands(run, type_in, asked):
    type_in(b"hello\n/reset\nworld\n/help\n/nonsense\n/exit\nnever\n")
    code, _, err = run("chat", "--system", "Be brief.", *SETTINGS)
    assert code == 0
    system = {"role": "system", "content": "Be brief."}
    assert [prompt for prompt, _ in asked] == [[system, user("hello")], [system, user("world")]]
    said = err.splitlines()
    assert said[0] == "a new conversation"
    assert said[1].startswith("/reset begins")
    assert said[2].startswith("unknown command /nonsense")


def test_a_turn_that_is_too_long_is_left_out_and_the_chat_goes_on(run, type_in, asked):
    type_in(b"hello\n" + b"word " * 100 + b"\nworld\n")
    code, _, err = run("chat", *SETTINGS)
    assert code == 0
    assert err.startswith("refgemma: the prompt has ")
    assert "/reset" in err
    assert [message["content"] for message in asked[2][0] if message["role"] == "user"] == ["hello", "world"]


def test_a_line_that_is_not_utf8(run, type_in):
    type_in(b"\xff\n")
    assert run("chat") == (2, "", "refgemma: standard input is not UTF-8: byte 0 is 0xff; expected text in UTF-8\n")


def test_ctrl_c_keeps_what_was_printed(folder):
    command = [
        sys.executable,
        "-m",
        "refgemma",
        "chat",
        "--model",
        str(folder),
        "--temperature",
        "0",
        "--max-tokens",
        "3",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, err) == (130, b"")
    assert b"\n\n\n".startswith(first + out)  # the answer, or as much of it as there was time for


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("end", "code"), [(b"\x04", 0), (b"\x03", 130)])
def test_at_a_terminal(folder, end, code):
    """Greeting, prompt, answer, prompt; then Ctrl-D or Ctrl-C."""
    here, there = os.openpty()
    command = [sys.executable, "-m", "refgemma", "chat", "--model", str(folder), *SETTINGS]
    # A session of its own makes the terminal the controlling one, so that Ctrl-C reaches the program as a signal.
    child = [sys.executable, "-c", CHILD, os.ttyname(there), *command]
    with subprocess.Popen(child, start_new_session=True) as process:
        seen = read_until(here, b"> ")
        assert b"Talking with" in seen
        os.write(here, b"hello\n")
        seen = read_until(here, b"> ")
        while process.poll() is None:
            # Python misses a Ctrl-C between the prompt of readline and its wait for input; nobody types so fast.
            os.write(here, end)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
        assert process.returncode == code
    os.close(there)
    os.close(here)
    assert b"Traceback" not in seen


CHILD = """
import os, sys
terminal = os.open(sys.argv[1], os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(terminal, stream)
os.environ["TERM"] = "dumb"
os.execv(sys.argv[2], sys.argv[2:])
"""


def read_until(terminal, end):
    seen = b""
    while not seen.endswith(end):
        seen += os.read(terminal, 1024)
    return seen
