"""The array libraries that operations are tested with, and how a test written for NumPy arrays runs on each of them."""

import importlib.util
import sys
from functools import partial

import numpy as np
import pytest

from refgemma.cache import KVCache
from refgemma.device import array_library, placed
from refgemma.numerics import to_host
from tests.device.strict_cupy import cupy as stand_in


def _gpu():
    if importlib.util.find_spec("cupy") is None:
        return False
    try:
        array_library("cuda")
    except ValueError:
        return False
    return True


ON_DEVICE = ["stand-in", "cupy"] if _gpu() else ["stand-in"]
ALL = ["numpy", *ON_DEVICE]


@pytest.fixture(params=ALL)
def xp(request, monkeypatch):
    """NumPy, the stand-in for CuPy, and CuPy itself where there is a GPU."""
    return use(request.param, monkeypatch)


@pytest.fixture(params=ON_DEVICE)
def device_xp(request, monkeypatch):
    """The stand-in for CuPy, and CuPy itself where there is a GPU."""
    return use(request.param, monkeypatch)


@pytest.fixture
def device(xp):
    """Its name for `refgemma.load`."""
    return "cpu" if xp is np else "cuda"


@pytest.fixture
def on_each_library(xp, request, monkeypatch):
    """What the module of the test names in OPERATIONS computes with the arrays of each library in turn.

    The test itself is written for NumPy arrays, and sees no others. A cache that it makes is one of that library.
    """
    module = request.module
    for name in module.OPERATIONS:
        monkeypatch.setattr(module, name, on(xp, getattr(module, name)))
    if hasattr(module, "KVCache"):
        monkeypatch.setattr(module, "KVCache", partial(KVCache, xp=xp))


def use(name, monkeypatch):
    """The library of that name; ``import cupy`` gives it, too, while the test runs."""
    if name == "numpy":
        return np
    if name == "stand-in":
        monkeypatch.setitem(sys.modules, "cupy", stand_in)
    return importlib.import_module("cupy")


def on(xp, function):
    """The function, computing with arrays of `xp`: NumPy arrays go in, and NumPy arrays come out."""

    def computed_there(*args, tap=None, **kwargs):
        there = [placed(x, xp) for x in args]
        if tap is not None:
            kwargs["tap"] = lambda name, value: placed(tap(name, back(xp, value)), xp)
        return back(xp, function(*there, **{name: placed(x, xp) for name, x in kwargs.items()}))

    return computed_there


def back(xp, result):
    """What came out, on the host; it must have been where it was to be computed."""
    if isinstance(result, tuple):
        return tuple(back(xp, part) for part in result)
    assert isinstance(result, xp.ndarray), f"a {type(result)} came out of a computation with {xp.__name__}"
    return to_host(result)
