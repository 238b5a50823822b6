import os
from pathlib import Path

import pytest

import refgemma
from refgemma.checkpoint.folder import find_model
from tests.checkpoint.files import one_sentence

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def empty_machine(tmp_path, monkeypatch):
    """A current folder and a home without models."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def put_model(folder):
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def put_in_cache(cache, name="google/gemma-0b-test"):
    repo = Path(cache) / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION + "\n")
    put_model(repo / "snapshots" / ("f" * 40))  # an older download
    return put_model(repo / "snapshots" / REVISION)


def test_a_folder_is_taken_as_it_is(tmp_path):
    folder = put_model(tmp_path / "models" / "mine")
    for name in (folder, str(folder), f"{folder}/", os.path.relpath(folder)):
        assert find_model(name).samefile(folder)
    put_model(tmp_path / "home" / "mine")
    assert find_model("~/mine") == tmp_path / "home" / "mine"


def test_a_folder_here_comes_before_the_model_of_that_name():
    put_model("weights/tiny-it")
    assert find_model("tiny-it") == Path("weights/tiny-it")
    put_model("tiny-it")
    assert find_model("tiny-it") == Path("tiny-it")


@pytest.mark.parametrize("kept_as", ["google/gemma-0b-test", "gemma-0b-test"])
@pytest.mark.parametrize("asked_for", ["google/gemma-0b-test", "gemma-0b-test"])
def test_the_owner_google_may_be_left_out(asked_for, kept_as):
    folder = put_model(Path("weights") / kept_as)
    assert find_model(asked_for) == folder


def test_the_model_of_another_owner_is_another_model():
    put_model("weights/gemma-0b-test")
    put_model("weights/google/gemma-0b-test")
    with pytest.raises(FileNotFoundError, match="no model 'bob/gemma-0b-test'"):
        find_model("bob/gemma-0b-test")
    theirs = put_model("weights/bob/gemma-0b-test")
    assert find_model("bob/gemma-0b-test") == theirs


@pytest.mark.parametrize(
    ("variables", "cache"),
    [
        ({}, "home/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/hub"),
        ({"XDG_CACHE_HOME": "xdg", "HF_HOME": "hf"}, "hf/hub"),
        ({"HF_HOME": "hf", "HUGGINGFACE_HUB_CACHE": "old"}, "old"),
        ({"HF_HOME": "hf", "HUGGINGFACE_HUB_CACHE": "old", "HF_HUB_CACHE": "cache"}, "cache"),
    ],
)
def test_the_hub_cache_is_where_huggingface_hub_keeps_it(tmp_path, monkeypatch, variables, cache):
    for name, folder in variables.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    expected = put_in_cache(tmp_path / cache)
    assert find_model("google/gemma-0b-test") == expected
    assert find_model("gemma-0b-test") == expected


def test_only_the_given_places_are_searched(tmp_path):
    put_model("weights/gemma-0b-test")
    expected = put_in_cache(tmp_path / "elsewhere")
    assert find_model("gemma-0b-test", search=[tmp_path / "nowhere", str(tmp_path / "elsewhere")]) == expected


def test_a_model_that_is_nowhere_is_one_sentence(tmp_path):
    put_model("weights/gemma-7b")
    put_model("weights/google/gemma-2b")
    with pytest.raises(FileNotFoundError, match="no model 'google/gemma-0b-test'") as error:
        find_model("google/gemma-0b-test")
    text = one_sentence(error)
    assert f"weights, {Path(refgemma.__file__).parents[1] / 'weights'}" in text
    assert str(tmp_path / "home/.cache/huggingface/hub") in text
    assert "gemma-7b" in text
    assert "google/gemma-2b" in text
    assert "refgemma download" in text


@pytest.mark.parametrize("folder", ["weights/google/gemma-0b-test", "gemma-0b-test"])
def test_a_folder_without_its_config_is_one_sentence(folder):
    Path(folder).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"^{folder} holds no config.json") as error:
        find_model("gemma-0b-test")
    one_sentence(error)


def test_a_file_is_one_sentence(tmp_path):
    config = put_model(tmp_path / "mine") / "config.json"
    with pytest.raises(ValueError, match="is a file: give the folder") as error:
        find_model(config)
    one_sentence(error)


def test_an_empty_name_is_not_the_current_folder():
    Path("config.json").write_text("{}")
    with pytest.raises(ValueError, match="the model name is empty") as error:
        find_model("")
    one_sentence(error)


def test_a_name_that_is_none_is_one_sentence():
    with pytest.raises(TypeError, match="the model is None: expected the name of a model or its folder") as error:
        find_model(None)
    one_sentence(error)


def test_the_home_of_nobody_is_one_sentence():
    with pytest.raises(FileNotFoundError, match="the home folder of an unknown user") as error:
        find_model("~nobody-of-this-name/model")
    one_sentence(error)


def test_a_partly_deleted_cache_is_one_sentence(tmp_path):
    folder = put_in_cache(tmp_path / "cache")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"{REVISION} holds no config.json"):
        find_model("gemma-0b-test", search=[tmp_path / "cache"])
    folder.rmdir()
    with pytest.raises(FileNotFoundError, match="no model 'gemma-0b-test'"):
        find_model("gemma-0b-test", search=[tmp_path / "cache"])
