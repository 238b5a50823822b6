"""`refgemma bench` used badly: one sentence, and nothing measured. What it prints is in tests/bench."""

import pytest

from refgemma.cli import bench, main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "gemma-3"], "invalid choice: 'gemma-3'"),
        (["--weights", "float16"], "expected float32, bfloat16 or float32,bfloat16, not 'float16'"),
        (["--weights", ""], "expected float32, bfloat16 or float32,bfloat16, not ''"),
        (["--rounds", "0"], "--rounds is 0: expected at least 1"),
        (["--picture", "roofline.gif"], "roofline.gif ends in '.gif': expected .png, .svg, .pdf"),
        (["--keep", "absent/folder", "--size", "tiny"], "absent/folder is not a folder"),
    ],
)
def test_bad_use(capsys, arguments, words):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_peers_that_are_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(bench, "peers_installed", lambda: False)
    assert main(["bench", "--peers"]) == 2
    assert "which is not installed: pip install" in capsys.readouterr().err


def test_weights_that_do_not_fit(monkeypatch, capsys):
    monkeypatch.setattr("refgemma.bench.machine.available_memory", lambda: 10**9)
    assert main(["bench", "--weights", "bfloat16"]) == 2
    err = capsys.readouterr().err
    assert "need 6.0 GB of memory, 1.0 GB are free: measure a smaller --size" in err
    assert err.count("\n") == 1
