"""Random checkpoints: complete, of the shape that was asked for, kept or gone."""

from dataclasses import replace

import numpy as np
import pytest

from refgemma.bench import run
from refgemma.bench.run import SHAPES, checkpoint, make
from refgemma.checkpoint.folder import find_model
from refgemma.checkpoint.load import load_params
from refgemma.config import read_config
from tests.models import reshaped


def test_a_checkpoint_loads_and_holds_different_numbers_everywhere(folder, config):
    assert read_config(folder) == config
    params = load_params(folder, config)
    gate, up = params["layers"][0]["mlp"]["gate"], params["layers"][1]["mlp"]["up"]
    assert not np.array_equal(gate, up)
    # Of 2,880 numbers with deviation 1/sqrt(40): their deviation is off by 1/sqrt(2 * 2880), 1.3 %, at one sigma; four
    # of it.
    assert np.std(gate) == pytest.approx(40**-0.5, rel=0.053)
    norm = params["final_norm"]
    assert -0.9 < norm.mean() < 0.9  # an offset from one, not one plus the offset


def test_pieces_make_no_difference_to_the_shape(tmp_path, monkeypatch, config):
    monkeypatch.setattr(run, "_PIECE", 100)
    seen = []
    folder = make(tmp_path / "small", config, lambda done, total: seen.append((done, total)))
    load_params(folder, config)
    total = 2 * config.num_parameters
    assert seen[0] == (200, total)
    assert seen[-1] == (total, total)


def test_an_untied_head_is_written_too(tmp_path, config):
    untied = replace(config, tie_word_embeddings=False)
    folder = make(tmp_path / "untied", untied)
    assert read_config(folder) == untied
    assert load_params(folder, untied)["head"].shape == (96, 40)


def test_the_tiny_size_has_the_shape_of_the_shipped_model():
    assert SHAPES["tiny"] == read_config(find_model("tiny-it"))


def test_a_temporary_checkpoint_is_gone_afterwards(monkeypatch, config):
    monkeypatch.setitem(SHAPES, "small", config)
    with checkpoint("small") as folder:
        assert read_config(folder) == config
    assert not folder.parent.exists()


def test_a_kept_checkpoint_is_found_again(tmp_path, monkeypatch, config):
    monkeypatch.setitem(SHAPES, "small", config)
    with checkpoint("small", tmp_path) as folder:
        assert folder == tmp_path / "small"
    with checkpoint("small", tmp_path, lambda *_: pytest.fail("written again")) as folder:
        assert read_config(folder) == config
    monkeypatch.setitem(SHAPES, "small", reshaped(config, num_layers=3))
    with pytest.raises(ValueError, match=r"small holds a model of another shape"), checkpoint("small", tmp_path):
        pass


def test_nothing_is_left_of_one_that_was_not_finished(tmp_path, config):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "small", config, stop)
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_place(tmp_path, monkeypatch, config):
    monkeypatch.setitem(SHAPES, "small", config)
    with pytest.raises(FileNotFoundError, match=r"absent is not a folder"), checkpoint("small", tmp_path / "absent"):
        pass
