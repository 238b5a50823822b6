"""The shipped model under both hosted names, with its adapters as finetunes."""

import pytest

from refgemma.workers_ai import AI
from refgemma.workers_ai.pages import HOSTED
from tests.tiny_it import tiny_it


@pytest.fixture(scope="session")
def ai():
    """Answers requests; no test may change its finetunes."""
    return AI({name: tiny_it() for name in HOSTED}, loras={"pirate": "pirate", "0-0-json": "json"})
