"""Choosing a device, moving weights there, and what is said where there is none."""

import importlib.util
import sys
import types

import numpy as np
import pytest

import refgemma
from refgemma.cli import main
from refgemma.device import array_library, placed
from refgemma.numerics import Bfloat16Matrix, namespace_of, to_bfloat16, to_host
from refgemma.ops.linear import Adapted, Delta
from tests.device.libraries import ON_DEVICE

# ---- is there one?


def test_the_libraries_are_found(device_xp):
    assert array_library("cpu") is np
    assert array_library("cuda") is device_xp
    assert namespace_of(device_xp.zeros(2)) is device_xp


def broken(error):
    """A CuPy that imports and cannot compute."""

    def ones(*args):
        raise error

    cupy = types.ModuleType("cupy")
    cupy.ones = ones
    return cupy


class CUDARuntimeError(RuntimeError):
    """As CuPy raises it without a driver."""


NOT_INSTALLED = "device 'cuda' computes with CuPy, which is not installed: pip install \"refgemma[gpu]\", or use 'cpu'"
NONE = "device 'cuda' was asked for, and CuPy finds none to compute on: "


@pytest.mark.parametrize(
    ("cupy", "sentence"),
    [
        (None, NOT_INSTALLED),
        (
            broken(CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")),
            NONE + "cudaErrorInsufficientDriver: CUDA driver version is insufficient",
        ),
        (
            broken(ImportError("CuPy failed to load libcublas.so.12:\nOSError: cannot open")),
            NONE + "CuPy failed to load libcublas.so.12: OSError: cannot open",
        ),
    ],
    ids=["no CuPy", "no driver", "no CUDA library"],
)
def test_without_one_it_is_one_clear_sentence(monkeypatch, capsys, cupy, sentence):
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # None: what import does when there is no such package
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole sentence is compared
        refgemma.load("tiny-it", device="cuda")
    assert str(caught.value) == sentence
    for command in (
        ["generate", "Hi"],
        ["logits", "Hi"],
        ["score", "Hi"],
        ["chat"],
        ["trace", "Hi", "--output", "x.safetensors"],
    ):
        assert main([*command, "--device", "cuda"]) == 2
        assert capsys.readouterr().err == f"refgemma: {sentence}\n"


def test_another_device_is_refused():
    with pytest.raises(ValueError, match=r"^device is 'mps': expected 'cpu' or 'cuda'$"):
        array_library("mps")


def test_on_a_gpu_these_tests_run_on_cupy_itself():
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("needs CuPy and a GPU: the tests of devices ran on the stand-in only, CuPy is not installed")
    if ON_DEVICE == ["stand-in"]:
        pytest.skip("needs a GPU: the tests of devices ran on the stand-in only")
    assert "cupy" in ON_DEVICE


# ---- there and back


def weights():
    """A tree as of parameters: a tied table, a matrix of each kind, an adapter for some rows, a vector."""
    rng = np.random.default_rng(1)
    a, b, w = (rng.normal(size=shape).astype(np.float32) for shape in [(2, 5), (4, 2), (4, 5)])
    table = Bfloat16Matrix(to_bfloat16(w))
    delta = Delta(a=a, b=b, scale=0.5, rows=np.array([True, False]), gain=np.ones(4))
    return {"embed": table, "layers": [{"q": Adapted(w, (delta,)), "norm": w[0]}], "head": table}


def test_weights_go_there_and_come_back(xp):
    tree = weights()
    there = placed(tree, xp)
    delta = there["layers"][0]["q"].deltas[0]
    arrays = [there["embed"].bits, there["layers"][0]["q"].base, there["layers"][0]["norm"]]
    for array in (*arrays, delta.a, delta.b, delta.rows, delta.gain):
        assert isinstance(array, xp.ndarray)
    assert there["head"] is there["embed"]
    assert delta.bias is None
    assert there["layers"][0]["q"].deltas[0].scale == 0.5
    again = placed(there, np)
    assert np.array_equal(again["embed"].bits, tree["embed"].bits)
    assert again["embed"].bits.dtype == np.uint16
    assert np.array_equal(again["layers"][0]["q"].deltas[0].rows, [True, False])
    assert again["head"] is again["embed"]


def test_what_is_there_is_shared(xp):
    there = placed(weights(), xp)
    assert placed(there, xp) is there
    added = there | {"new": np.zeros(3)}
    moved = placed(added, xp)
    assert moved["layers"] is there["layers"]
    assert isinstance(moved["new"], xp.ndarray)


def test_to_host_copies_nothing_that_is_there():
    x = np.zeros(3)
    assert to_host(x) is x


# ---- loading


def test_matrices_cross_as_they_are_stored_and_are_widened_there(device_xp, monkeypatch):
    """So that the host never holds a second copy, wider than the file."""
    crossed, asarray = [], device_xp.asarray

    def spy(x, *args, **kwargs):
        if isinstance(x, np.ndarray) and x.ndim == 2:
            crossed.append((x.dtype, x.base is not None))
        return asarray(x, *args, **kwargs)

    monkeypatch.setattr(device_xp, "asarray", spy)
    gemma = refgemma.load("tiny-it", device="cuda")
    assert gemma.params["embed"].dtype == np.float32
    assert set(crossed) == {(np.dtype(np.uint16), True)}  # stored bits, views of the mapped file
    assert len(crossed) == 1 + 7 * gemma.config.num_layers  # each once
