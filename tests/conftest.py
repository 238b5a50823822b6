"""What many tests need: a small vocabulary of our own, and Gemma's where somebody has put it."""

import json
import os
import signal
from pathlib import Path

# Before NumPy is loaded: the matrices of these tests are so small that BLAS threads would only wait for one another, on
# a busy machine for minutes. Tests of threads bring their own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A shell that runs tests in the background has them ignore Ctrl-C, and so would every program they start, for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from refgemma.text.tokenizer import Tokenizer
from tests import vocabulary
from tests.device.libraries import device, device_xp, on_each_library, xp  # noqa: F401  fixtures

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory):
    """A tokenizer with Gemma's conventions and 500 pieces; its file is ``small_tokenizer.path``."""
    return Tokenizer(vocabulary.train(tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"))


@pytest.fixture(scope="session")
def gemma_tokenizer():
    """The tokenizer of Gemma 1 and 2: REFGEMMA_TOKENIZER, or the copy in ../shared; skips where neither is."""
    path = Path(os.environ.get("REFGEMMA_TOKENIZER") or SHARED / "tokenizer/gemma/tokenizer.model")
    if not path.exists():
        pytest.skip(f"needs Gemma's tokenizer.model: {path} is absent, and REFGEMMA_TOKENIZER may name another place")
    return Tokenizer(path)


@pytest.fixture(params=["small_tokenizer", "gemma_tokenizer"])
def tokenizer(request):
    """Each of the two in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def shared_json():
    """Reader of a JSON file in ../shared; skips where it is absent."""

    def read(name):
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs ../shared/{name}, which is not part of the project")
        return json.loads(path.read_text(encoding="utf-8"))

    return read
