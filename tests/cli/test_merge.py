"""`refgemma merge`: what it writes, what the audit tells, and what is left when it is stopped."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

import refgemma
from refgemma import lora
from refgemma.cli import main
from refgemma.lora import merged_checkpoint
from tests.lora.folders import factors, write
from tests.models import random_model


@pytest.fixture
def adapter(tmp_path, gemma):
    """A small change of the model of this folder's tests."""
    m = random_model(2, vocab_size=gemma.config.vocab_size, num_layers=3, max_positions=96)
    assert m.config == gemma.config
    small = {name: 0.01 * w if "lora_B" in name else w for name, w in factors(m).items()}
    return write(tmp_path / "style", m, small, "float32")


@pytest.fixture
def merge(folder, capsys):
    """``merge(...)``: exit code, standard output, standard error; the base is given."""

    def merge(*arguments):
        code = main(["merge", str(folder), *map(str, arguments)])
        return code, *capsys.readouterr()

    return merge


PROMPT = "hello there"


def test_merge(merge, adapter, gemma, tmp_path):
    out = tmp_path / "out"
    code, printed, err = merge(adapter, out)
    assert (code, err) == (0, "")
    assert printed == f"{out}: 6 weights changed, bfloat16, {told_size(out)} in 1 file\n"
    merged, attached = refgemma.load(out), gemma.with_lora(lora.read(adapter))
    tokens = gemma.encode_prompt(PROMPT)
    far, near = (abs(g.logits(tokens) - attached.logits(tokens)).max() for g in (gemma, merged))
    assert near < far / 2  # tests/lora/test_merged_checkpoint.py says how near


def told_size(out):
    from refgemma.cli.terminal import size

    with (out / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    return size((out / "model.safetensors").stat().st_size - header)


def test_scales_formats_and_json(merge, adapter, tmp_path, folder):
    code, printed, _ = merge(f"{adapter}:0.5", adapter, tmp_path / "out", "--dtype", "float32", "--json")
    assert code == 0
    shown = json.loads(printed)
    assert shown["base"] == str(folder)
    assert shown["adapters"] == [f"{adapter}:0.5", str(adapter)]
    assert shown["merged"]["folder"] == str(tmp_path / "out")
    assert shown["merged"]["dtype"] == "float32"
    assert len(shown["merged"]["changed"]) == 6
    assert "audit" not in shown
    once = merged_checkpoint.merge_checkpoint(folder, f"{adapter}:1.5", tmp_path / "once", "float32")
    assert once.nbytes == shown["merged"]["nbytes"]


def test_audit_without_out_writes_nothing(merge, adapter, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, printed, err = merge(adapter, "--audit")
    assert (code, err) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    lines = [line.split() for line in printed.splitlines()]
    assert [words[:3] for words in lines[3:5]] == [["layers.{i}.attn.q", "3", "x"], ["layers.{i}.mlp.down", "3", "x"]]
    assert lines[5][0] == "all"
    assert max(map(len, printed.splitlines())) <= 120
    every = merge(adapter, "--audit", "--all")[1]
    assert [line.split()[0] for line in every.splitlines()[3:-1]] == [
        f"layers.{i}.{module}" for module in ("attn.q", "mlp.down") for i in range(3)
    ]


def test_audit_and_merge_at_once(merge, adapter, gemma, tmp_path):
    code, printed, err = merge(adapter, tmp_path / "out", "--audit", "--prompt", PROMPT, "--json")
    assert (code, err) == (0, "")
    shown = json.loads(printed)
    assert (tmp_path / "out/model.safetensors").is_file()
    tokens = gemma.encode_prompt(PROMPT)
    want = lora.audit(refgemma.load(shown["base"], weights="bfloat16"), lora.read(adapter), tokens=tokens)
    assert [row["path"] for row in shown["audit"]["weights"]] == [row.path for row in want.weights]
    for row, wanted in zip(shown["audit"]["weights"], want.weights, strict=True):
        assert row["unmoved"] == wanted.unmoved
        assert row["update_error"] == wanted.update_error
    assert [change["model"] for change in shown["audit"]["logits"]] == [change.model for change in want.logits]
    assert shown["audit"]["logits"][0]["positions"] == len(tokens)


def test_logits_in_the_table(merge, adapter):
    printed = merge(adapter, "--audit", "--prompt", PROMPT, "--dtype", "float16")[1]
    tail = printed[printed.index("logits against those with the adapter attached") :].splitlines()
    assert [line.split("  ")[0] for line in tail[2:]] == ["base", "merged in float32", "merged in float16"]


def test_picture(merge, adapter, tmp_path):
    pytest.importorskip("matplotlib")
    assert merge(adapter, "--audit", "--picture", tmp_path / "audit.png")[0] == 0
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_an_untrained_adapter_in_the_table(merge, adapter, tmp_path):
    m = random_model(2, vocab_size=500, num_layers=3, max_positions=96)
    write(adapter, m, {name: 0 * w if "lora_B" in name else w for name, w in factors(m).items()}, "float32")
    code, printed, _ = merge(adapter, "--audit")
    assert code == 0
    assert [line.split()[-2:] for line in printed.splitlines()[3:]] == [["\u2013", "\u2013"]] * 3
    shown = json.loads(merge(adapter, "--audit", "--json")[1])
    assert shown["audit"]["total"]["unmoved"] is None


# ---- bad use


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{adapter}"], "expected adapters and the folder to make, or --audit"),
        (["{adapter}", "{adapter}"], "is an adapter, and no folder to make comes after it: add one, or --audit"),
        (["{adapter}", "{adapter}:0.5"], "style:0.5' is an adapter, and no folder to make comes after it"),
        (["{adapter}", "pirate"], "'pirate' is an adapter, and no folder to make comes after it"),
        (["{adapter}", "."], "exists: expected the name of a folder to make"),
        (["{adapter}", "out", "--what", "--all"], "unrecognized arguments: --what"),
        (["{adapter}:nan", "out"], "scale is nan: expected a finite number"),
        (["{adapter}:inf", "--audit"], "scale is inf: expected a finite number"),
        (["{adapter}", "out", "--prompt", "x"], "--prompt is part of the audit: add --audit"),
        (["{adapter}", "out", "--picture", "x.png"], "--picture is part of the audit: add --audit"),
        (["{adapter}", "out", "--all"], "--all is part of the audit: add --audit"),
        (["{adapter}", "--audit", "--picture", "x.gif"], "x.gif ends in '.gif': expected .png, .svg, .pdf"),
        (["nobody", "--audit"], "no adapter 'nobody'"),
        (["{adapter}", "nobody:0.5", "--audit"], "no adapter 'nobody'"),
        (["nobody", "out"], "no adapter 'nobody'"),
        (["{adapter}", "no/such/out", "--audit"], "is not a folder"),
        (["{adapter}", "out", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_use(merge, adapter, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, printed, err = merge(*(word.format(adapter=adapter) for word in arguments))
    assert (code, printed) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "order",
    [
        ["{adapter}", "--dtype", "float32", "{out}"],
        ["{adapter}", "{out}", "--dtype", "float32"],
        ["--dtype", "float32", "{adapter}", "{out}"],
        ["{adapter}:0.5", "--dtype", "float32", "{adapter}:0.5", "--json", "{out}"],
    ],
)
def test_options_stand_where_they_like(merge, adapter, tmp_path, order):
    code, _, err = merge(*(word.format(adapter=adapter, out=tmp_path / "out") for word in order))
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"


def test_a_folder_with_the_name_of_a_shipped_adapter(merge, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert merge(adapter, "./pirate")[0] == 0
    assert (tmp_path / "pirate/model.safetensors").is_file()


def test_the_audit_takes_scales(merge, adapter):
    norms = [
        json.loads(merge(f"{adapter}{scale}", "--audit", "--json")[1])["audit"]["total"]["relative_norm"]
        for scale in ("", ":0.5", ":-2")
    ]
    assert norms[1:] == pytest.approx([norms[0] / 2, norms[0] * 2], rel=1e-6)  # factors in float32


SIGNALS = ["SIGTERM", "SIGHUP", "SIGINT"]


@pytest.fixture
def heeded():
    """Signals as in a terminal: under nohup, or in the background of a script, some are ignored."""

    def unheeded(number, _):  # and not the default, which would end the tests
        pytest.fail(f"signal {number} was not heeded")

    usual = {signal.SIGTERM: unheeded, signal.SIGHUP: unheeded, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has none of them to catch")
@pytest.mark.parametrize("second", [None, "SIGTERM"])
@pytest.mark.parametrize("name", SIGNALS)
def test_stopped_halfway_it_leaves_nothing(merge, adapter, tmp_path, monkeypatch, heeded, name, second):
    write_weights, rmtree, before = merged_checkpoint.write_weights, shutil.rmtree, sorted(tmp_path.rglob("*"))
    number, removed = getattr(signal, name), []

    def write_and_be_killed(folder: Path, files, progress):
        write_weights(folder, files, lambda done, total: os.kill(os.getpid(), number))

    def remove_and_be_killed_again(folder, **options):
        if second and number != signal.SIGINT:
            os.kill(os.getpid(), getattr(signal, second))
        removed.append(folder)
        rmtree(folder, **options)

    monkeypatch.setattr(merged_checkpoint, "write_weights", write_and_be_killed)
    monkeypatch.setattr(shutil, "rmtree", remove_and_be_killed_again)
    try:
        ended = merge(adapter, tmp_path / "out")[0]
    except SystemExit as end:
        ended = end.code
    assert ended == 128 + number
    assert len(removed) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert {number: signal.getsignal(number) for number in heeded} == heeded


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_what_is_ignored_stays_so(merge, adapter, tmp_path, monkeypatch, heeded):
    """Under nohup a merge goes on when the terminal is closed."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    write_weights = merged_checkpoint.write_weights

    def write_and_be_hung_up(folder: Path, files, progress):
        write_weights(folder, files, lambda done, total: os.kill(os.getpid(), signal.SIGHUP))

    monkeypatch.setattr(merged_checkpoint, "write_weights", write_and_be_hung_up)
    assert merge(adapter, tmp_path / "out")[0] == 0
    assert (tmp_path / "out/model.safetensors").is_file()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
