"""A model folder for the command line, and the library's own view of it."""

import io
import shutil
import sys

import pytest

import refgemma
from refgemma.cli import main
from tests.checkpoint.files import write_model
from tests.hub.fake_hub import hub, hub_model  # noqa: F401
from tests.models import random_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory, small_tokenizer):
    """A random model that reads 96 tokens, stored in bfloat16."""
    model = random_model(2, vocab_size=small_tokenizer.vocab_size, num_layers=3, max_positions=96)
    path = write_model(tmp_path_factory.mktemp("models") / "random", model, "BF16")
    shutil.copy(small_tokenizer.path, path / "tokenizer.model")
    return path


@pytest.fixture(scope="session")
def gemma(folder):
    """The same model through the library."""
    return refgemma.load(folder)


@pytest.fixture
def run(folder, capsys):
    """``run("score", "text")``: exit code, standard output, standard error of a subcommand with the model above."""

    def run(command, *arguments):
        code = main([command, "--model", str(folder), *arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def type_in(monkeypatch):
    """``type_in(data)``: what standard input holds, as from a pipe."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture
def asked(monkeypatch):
    """Every call of Gemma.stream: a list of (prompt, options)."""
    calls, stream = [], refgemma.Gemma.stream

    def spy(self, prompt, **options):
        calls.append((prompt, options))
        return stream(self, prompt, **options)

    monkeypatch.setattr(refgemma.Gemma, "stream", spy)
    return calls
