"""A small model in a folder, as it would be downloaded, and loaded."""

import functools
import shutil

import pytest

import refgemma
from refgemma.numerics import from_bfloat16, to_bfloat16
from tests.checkpoint.files import write_model
from tests.gemma.texts import CONTEXT
from tests.models import map_params
from tests.talker import talker


@pytest.fixture(scope="package")
def model():
    """With weights that bfloat16 holds exactly."""
    model = talker(max_positions=CONTEXT)
    params = map_params(lambda w: from_bfloat16(to_bfloat16(w)), model.params)
    model.params.update(params)
    return model


@pytest.fixture(scope="package")
def folder(tmp_path_factory, model, small_tokenizer):
    """The model as it would be downloaded."""
    folder = write_model(tmp_path_factory.mktemp("model") / "talker", model, "BF16")
    shutil.copy(small_tokenizer.path, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="package")
def load_for(folder):
    """Function from a device, and the array library it stands for, to the model there."""
    return functools.cache(lambda device, xp: refgemma.load(folder, numerics="float64", device=device))


@pytest.fixture
def gemma(load_for, device, xp):
    """In float64, where runs of different shapes agree to 1e-12 and no decision is that near to another."""
    return load_for(device, xp)
