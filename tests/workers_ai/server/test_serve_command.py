"""``refgemma serve`` as a process: what it says when it is ready, how it ends, and what it refuses."""

import json
import os
import signal
import subprocess
import sys

import pytest

import refgemma.cli
from refgemma.workers_ai.pages import GEMMA_2B, GEMMA_7B
from tests.workers_ai.server.live import RUN, ask, sent
from tests.workers_ai.server.process import started


def test_it_reports_the_models_and_the_address():
    with started() as (address, greeting, _):
        assert f"{GEMMA_2B}: tiny-it, the small model that ships with refgemma, as a stand-in" in greeting
        assert f"{GEMMA_7B}: tiny-it" in greeting
        assert "finetunes: pirate, json, letter" in greeting
        assert f"{address}/client/v4/accounts/" in greeting
        assert ask(address, RUN, {"prompt": "What is 17 + 25?", "temperature": 0}).result["response"] == "17 + 25 = 42."
        assert ask(address, RUN, {"prompt": "a"}, headers={"host": "evil.example"}).status == 403


def test_models_adapters_and_a_token_by_option(tmp_path):
    options = ["--model", f"{GEMMA_7B}=tiny-it", "--lora", "sailor=pirate", "--pad", "--finetunes", str(tmp_path / "f")]
    with started(*options, REFGEMMA_TOKEN="t") as (address, greeting, _):
        assert GEMMA_2B not in greeting
        assert "finetunes: sailor" in greeting
        path = RUN.replace(GEMMA_2B, GEMMA_7B)
        assert ask(address, path, {"prompt": "a"}).status == 401
        reply = ask(address, path, {"prompt": "a", "stream": True}, headers={"authorization": "Bearer t"})
        assert all(b'"p":"ab' in line or b'"p":"a"' in line for line in reply.body.split(b"\n\n")[:-2])
        assert (tmp_path / "f").is_dir()


def test_json_output_for_programs():
    with started("--json", until="}\n") as (address, output, _):
        state = json.loads(output)
        assert state["address"] == address
        assert list(state["models"]) == [GEMMA_2B, GEMMA_7B]
        assert state["finetunes"] == ["pirate", "json", "letter"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_streams_and_then_the_process(number, tmp_path):
    # At temperature 5 an end of turn may still come early: several streams, of which some must be in progress.
    body = {"prompt": "a", "raw": True, "temperature": 5, "max_tokens": 8000, "stream": True}
    with started(TMPDIR=str(tmp_path)) as (address, _, process):
        assert len(list(tmp_path.iterdir())) == 1  # for finetunes that are not kept
        streams = [sent(address, RUN, body | {"seed": seed}) for seed in range(1, 9)]
        responses = [stream.__enter__() for stream in streams]
        for response in responses:
            response.readline()
        process.send_signal(number)
        endings = [response.read().decode().split("\n\n")[-2].removeprefix("data: ") for response in responses]
        for stream in streams:
            stream.__exit__(None, None, None)
        assert process.wait(60) in ((0, -number) if number == signal.SIGTERM else (0, -number, 130))
        assert all(ending == "[DONE]" or json.loads(ending)["errors"][0]["code"] == 3008 for ending in endings)
        assert process.stderr.read() == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "gemma=tiny-it"], "expected '@cf/google/gemma-2b-it-lora' or '@cf/google/gemma-7b-it-lora'"),
        (["--model", GEMMA_2B], "expected NAME=DIR"),
        (["--model", f"{GEMMA_2B}=nowhere"], "no model 'nowhere'"),
        (["--lora", "x=nowhere"], "no adapter 'nowhere'"),
        (["--port", "99999"], "--port"),
        (["--host", "no.such.host.invalid", "--port", "0"], "cannot listen on no.such.host.invalid"),
        (["--token", ""], "token is empty"),
    ],
)
def test_what_it_refuses(options, words, capsys):
    assert refgemma.cli.main(["serve", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    with started() as (address, _, _):
        assert refgemma.cli.main(["serve", "--port", address.rpartition(":")[2]]) == 2
        assert "choose another with --port" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install():
    code = "import sys; sys.modules['uvicorn'] = None; import refgemma.cli; sys.exit(refgemma.cli.main(['serve']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert (done.returncode, 'pip install "refgemma[serve]"' in done.stderr) == (2, True)
