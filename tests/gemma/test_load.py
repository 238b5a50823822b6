"""Loading: formats in memory, progress, stop ids, and what is refused."""

import json
import shutil

import numpy as np
import pytest

import refgemma
from refgemma.files.safetensors import read_safetensors
from refgemma.numerics import FLOAT32, FLOAT64, Bfloat16Matrix, from_bfloat16
from tests.checkpoint.files import safetensors_bytes, write_model
from tests.judge import FLOAT64_BOUND
from tests.models import random_model


@pytest.mark.parametrize(
    ("numerics", "weights", "dtype"),
    [
        ("float32", None, np.float32),
        ("float64", None, np.float64),
        ("float32", "float32", np.float32),
        ("float64", "float32", np.float32),
        ("float32", "bfloat16", None),
        ("float64", "bfloat16", None),
    ],
)
def test_load(folder, model, gemma, device, xp, numerics, weights, dtype):
    loaded = refgemma.load(folder, numerics=numerics, weights=weights, device=device)
    assert loaded.config == model.config
    assert loaded.numerics is (FLOAT64 if numerics == "float64" else FLOAT32)
    assert loaded.tokenizer.vocab_size == 500
    assert loaded.params["final_norm"].dtype == loaded.numerics.dtype
    assert isinstance(loaded.params["final_norm"], xp.ndarray)
    matrix = loaded.params["layers"][1]["mlp"]["gate"]
    assert isinstance(matrix, Bfloat16Matrix) if dtype is None else matrix.dtype == dtype
    assert isinstance(matrix.bits if dtype is None else matrix, xp.ndarray)
    assert (loaded.params["head"] is loaded.params["embed"]) == loaded.config.tie_word_embeddings
    tokens = [2, 30, 31, 400]
    got, want = loaded.logits(tokens), gemma.logits(tokens)
    assert got.dtype == loaded.numerics.dtype
    if numerics == "float64":  # the same numbers in the same arithmetic
        assert np.abs(got - want).max() <= FLOAT64_BOUND * np.abs(want).max()
    else:
        # Measured for float32: 2.5e-7 of the largest logit; room for other orders of summation.
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


def test_load_takes_a_path_or_a_text(folder):
    assert refgemma.load(str(folder)).config == refgemma.load(folder).config


def test_load_reports_progress(folder, device):
    seen = []
    refgemma.load(folder, device=device, progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"numerics": "float16"}, r"^numerics is 'float16': expected 'float32', 'float64', 'bf16-transformers', "),
        ({"numerics": None}, r"^numerics is None: expected"),
        ({"weights": "int8"}, r"^weights is 'int8': expected 'bfloat16', 'float32' or 'float64'$"),
        ({"weights": "float64"}, r"^weights are 'float64', wider than the arithmetic 'float32': "),
        ({"device": "gpu"}, r"^device is 'gpu': expected 'cpu' or 'cuda'$"),
    ],
)
def test_load_refuses_unknown_settings(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        refgemma.load(folder, **settings)


def test_load_refuses_what_is_absent_or_does_not_belong_together(tmp_path, folder, small_tokenizer):
    with pytest.raises(FileNotFoundError):
        refgemma.load(tmp_path / "nothing")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model"):
        refgemma.load(bare)
    small = write_model(tmp_path / "small", random_model(0, vocab_size=499))
    shutil.copy(small_tokenizer.path, small / "tokenizer.model")
    with pytest.raises(ValueError, match="the tokenizer has 500 pieces, the embedding table 499 rows"):
        refgemma.load(small)


def test_stop_ids_are_those_of_the_vocabulary_and_of_the_folder(tmp_path, folder, gemma):
    tokenizer = gemma.tokenizer
    assert gemma.stop_ids == {tokenizer.eos_id, tokenizer.end_of_turn_id}
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 44]}))
    assert refgemma.load(other).stop_ids == {44, tokenizer.eos_id, tokenizer.end_of_turn_id}


def test_a_bfloat16_engine_is_not_imitated_on_wider_weights(tmp_path, folder):
    """Engines round such weights when they load them, and this is not done in silence here."""
    wide = tmp_path / "wide"
    shutil.copytree(folder, wide)
    path = wide / "model.safetensors"
    stored = {name: tensor.data for name, tensor in read_safetensors(path).items()}
    path.unlink()
    path.write_bytes(safetensors_bytes({name: from_bfloat16(data) for name, data in stored.items()}))
    assert refgemma.load(wide, numerics="float32").config == refgemma.load(folder, numerics="bf16-transformers").config
    with pytest.raises(
        ValueError, match="stores numbers that are not bfloat16, which an engine such as 'bf16-deepmind'"
    ):
        refgemma.load(wide, numerics="bf16-deepmind")
