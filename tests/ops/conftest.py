"""What the tests of products share."""

import pytest

import refgemma.compute.products as module
from tests.ops.weights import use_threads


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def tiny_tiles(request, monkeypatch):
    """Tiles of 20 numbers, so that small matrices have several and the last is cut off; and that many threads."""
    monkeypatch.setattr(module, "_TILE", 20)
    monkeypatch.setattr(module, "_ROWS", 3)
    monkeypatch.setattr(module, "_WORTH", 1)
    monkeypatch.setattr(module, "_WORTH_TURNING", 8)
    monkeypatch.setattr(module, "_TURNED", 2)
    use_threads(monkeypatch, request.param)
