"""The server with the shipped model, which most tests share."""

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("starlette", reason="needs the extra serve")

from dataclasses import replace

from refgemma.workers_ai.pages import HOSTED
from refgemma.workers_ai.server.app import create_app
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import serving


@pytest.fixture(scope="session")
def address():
    """Both hosted names, answered by the shipped model, with its adapters."""
    models = dict.fromkeys(HOSTED, tiny_it())
    with serving(create_app(models, {name: name for name in ("pirate", "json", "letter")})) as address:
        yield address


@pytest.fixture(scope="session")
def endless():
    """The shipped model without an end of turn: it writes up to max_tokens."""
    return replace(tiny_it(), stop_ids=frozenset())
