"""`refgemma download`: what it says before it begins, and what becomes of the answer."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import refgemma
from refgemma.checkpoint.folder import find_model
from refgemma.cli import main
from refgemma.cli.terminal import size
from refgemma.config import read_config
from tests.hub.fake_hub import NAME, sha256

SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture
def download(capsys):
    """``download(...)``: exit code, standard output, standard error."""

    def download(*arguments, name=NAME):
        code = main(["download", name, *arguments])
        return code, *capsys.readouterr()

    return download


def in_a_terminal_of_its_own(hub, *arguments, **environment):
    """The program as a shell runs it, with its hub and its cache in the environment."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(Path("home").resolve()), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "refgemma", *arguments]
    path = {"PYTHONPATH": str(Path(refgemma.__file__).parents[1])}
    return subprocess.run(
        command, env=os.environ | settings | path | environment, check=False, capture_output=True, text=True
    )


@pytest.mark.parametrize("answer", [b"n\n", b"\n", b"nay\n"])
def test_licence_and_size_are_told_and_no_is_no(hub, hub_model, download, type_in, tmp_path, answer):
    type_in(answer)
    code, out, err = download()
    assert (code, out) == (1, "")
    offered = list(hub_model.iterdir())
    total = size(sum(path.stat().st_size for path in offered))
    assert f"{NAME}, revision {hub.commit(NAME)}\n" in err
    assert "gemma, to be accepted at the hub: https://ai.google.dev/gemma/terms\n" in err
    assert f"{total} in {len(offered)} files\n" in err
    parameters = read_config(hub_model).num_parameters
    assert f"{size(2 * parameters)} with --weights bfloat16, {size(4 * parameters)} with float32" in err
    assert str(tmp_path / "cache/models--google--gemma-0b-it/snapshots" / hub.commit(NAME)) in err
    assert f"fetch {total}? [y/N] nothing was fetched\n" in err
    assert not hub.asked_for(SHARD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("answer", "option"), [(b"y\n", []), (b"YES\n", []), (b"", ["--yes"])])
def test_yes_is_yes(hub, download, type_in, answer, option):
    type_in(answer)
    code, out, err = download(*option)
    assert code == 0
    assert out == f"{find_model(NAME)}\n"
    assert ("[y/N]" in err) == (not option)
    code, again, err = download()  # nothing is left to be asked
    assert (code, again) == (0, out)
    assert "of it already here" in err


def test_nobody_to_ask(hub, download, type_in, tmp_path):
    type_in(b"")
    code, out, err = download()
    assert (code, out) == (2, "")
    assert err.endswith("\nrefgemma: no answer: answer y on standard input, or pass --yes\n".lstrip("\n"))
    assert list(tmp_path.iterdir()) == []


def test_json(hub, hub_model, download):
    code, out, _ = download("--yes", "--json", "--to", "mine")
    shown = json.loads(out)
    assert code == 0
    assert (shown["model"], shown["revision"], shown["licence"]) == (NAME, hub.commit(NAME), "gemma")
    assert shown["folder"] == str(Path("mine").resolve())
    assert shown["fetched"] == sum(file["size"] for file in shown["files"])
    assert {file["name"] for file in shown["files"]} == {path.name for path in hub_model.iterdir()}
    (shard,) = [file for file in shown["files"] if file["name"] == SHARD]
    assert shard["hash"] == sha256((hub_model / SHARD).read_bytes())
    assert json.loads(download("--yes", "--json", "--to", "mine")[1])["fetched"] == 0


def test_what_cannot_be_is_one_sentence(hub, download, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    Path("full").mkdir()
    Path("full/notes.txt").touch()
    for name, arguments, words in [
        (NAME, [], f"{NAME} is gated: accept its licence at {hub.url}/{NAME}"),
        ("google/gemma-3b", [], "has no model google/gemma-3b"),
        ("./gemma", ["--yes"], "'./gemma' is not the name of a model: expected OWNER/NAME"),
        ("a/b/c", ["--yes"], "'a/b/c' is not the name of a model: expected OWNER/NAME"),
    ]:
        code, out, err = download(*arguments, name=name)
        assert (code, out) == (2, "")
        assert err.startswith("refgemma: ")
        assert words in err
        assert err.count("\n") == 1
    hub.models[NAME]["gated"] = False
    code, out, err = download("--yes", "--to", "full")
    assert (code, out) == (2, "")
    assert "full is not empty, and lacks config.json" in err
    assert err.endswith(": give a folder that is empty or does not exist yet\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are of another kind there")
def test_ctrl_c_keeps_what_has_arrived(hub, hub_model, download, tmp_path):
    """A true signal, sent when the third block of a shard has arrived on the disk."""
    hub.stop_after = 30_000
    done = threading.Event()

    def interrupt():
        for _ in range(500):
            if sum(path.stat().st_size for path in tmp_path.rglob("*.refgemma-part")) >= 30_000:
                break
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        done.wait(5)  # the connection stays open: nothing but the signal ends it

    hub.when_stopped = interrupt
    code, out, err = download("--yes")
    done.set()
    assert (code, out) == (130, "")
    assert err.endswith("refgemma: stopped; the same command resumes it\n")
    with pytest.raises(FileNotFoundError):
        find_model(NAME)
    hub.stop_after = None
    code, out, err = download("--yes")
    assert code == 0
    assert "of it already here" in err
    (asked,) = hub.ranges()
    assert int(asked.removeprefix("bytes=").removesuffix("-")) >= 20_000
    assert (Path(out.strip()) / SHARD).read_bytes() == (hub_model / SHARD).read_bytes()


def test_from_a_shell(hub):
    """The variables that people set are those that count."""
    away = in_a_terminal_of_its_own(hub, "download", NAME, "--yes", HF_HUB_OFFLINE="1")
    assert (away.returncode, away.stdout) == (2, "")
    assert away.stderr == f"refgemma: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it to download {NAME}\n"
    assert hub.requests == []
    here = in_a_terminal_of_its_own(hub, "download", NAME, "--yes")
    assert here.returncode == 0, here.stderr
    assert here.stdout == f"{find_model(NAME)}\n"
    assert here.stderr.count("\n") == 5  # the summary: no progress where there is no terminal
    used = in_a_terminal_of_its_own(hub, "score", "hello world", "--model", NAME, "--json", HF_HUB_OFFLINE="1")
    assert json.loads(used.stdout)["model"] == NAME
