"""Downloads from a fake hub: what arrives, what is left behind when it goes wrong, and what is said."""

import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils import WeakFileLock

import refgemma
from refgemma.checkpoint.folder import find_model
from refgemma.hub import choose_place, fetch, look_up
from tests.checkpoint.files import one_sentence, write_model
from tests.hub.fake_hub import NAME, NOT_ACCEPTED, sha256
from tests.models import map_params, random_model

SHARD = "model-00001-of-00003.safetensors"
WANTED = [
    "config.json",
    "generation_config.json",
    SHARD,
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "tokenizer.model",
]


def download(to=None):
    return fetch(choose_place(look_up(NAME), to))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def parts():
    """What has arrived of files that are not complete."""
    return [path for path in Path().rglob("*.refgemma-part") if path.stat().st_size]


def same_as(folder, expected):
    assert names_in(folder) == WANTED
    assert all((folder / name).read_bytes() == (expected / name).read_bytes() for name in WANTED)
    return True


def stops_at(count):
    """A bar under which the user types Ctrl-C as soon as `count` bytes have been done."""

    def progress(done, total):
        if done >= count:
            raise KeyboardInterrupt

    @contextmanager
    def bar(what):
        yield progress

    return bar


@pytest.fixture(params=["cache", "folder"])
def to(request):
    """Each of the two places."""
    return None if request.param == "cache" else "models/mine"


@pytest.fixture
def impatient(monkeypatch):
    """Between two attempts no time passes."""
    monkeypatch.setattr(
        "huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    )


def test_a_download_is_found_and_is_the_model(hub, hub_model):
    folder = download()
    assert same_as(folder, hub_model)
    assert find_model(NAME) == folder
    assert find_model("gemma-0b-it") == folder
    expected, arrays = refgemma.load(hub_model), []
    map_params(arrays.append, refgemma.load(NAME).params)
    map_params(lambda array: np.testing.assert_array_equal(arrays.pop(0), array), expected.params)
    assert arrays == []


def test_only_what_a_model_needs_is_fetched(hub, hub_model):
    hub.models[NAME]["files"]["model.safetensors"] = b"a second set of weights" * 1000
    hub.models[NAME]["files"]["consolidated.safetensors"] = b"a third" * 1000
    assert same_as(download(), hub_model)
    data = hub.models[NAME]["files"]
    wanted = {sha256(data[name]) for name in WANTED}
    assert set(hub.sent) < wanted
    assert not hub.asked_for("pytorch_model.bin")
    assert not hub.asked_for("gemma-0b-it.gguf")
    assert hub.asked_for(SHARD)


def test_a_model_in_one_file(hub, hub_model, tmp_path):
    source = write_model(tmp_path / "single", random_model(1), "BF16")
    shutil.copy(hub_model / "tokenizer.model", source)
    hub.add(NAME, source)
    assert names_in(download()) == ["config.json", "model.safetensors", "tokenizer.model"]  # the rest is optional


def test_the_cache_is_the_hubs_own(hub):
    folder = download()
    cache = huggingface_hub.scan_cache_dir(folder.parents[2])
    assert cache.warnings == []
    (repository,) = cache.repos
    (revision,) = repository.revisions
    assert (repository.repo_id, revision.commit_hash, revision.refs) == (NAME, hub.commit(NAME), {"main"})
    assert {file.file_name for file in revision.files} == set(WANTED)
    for name in WANTED:
        cached = huggingface_hub.try_to_load_from_cache(NAME, name, cache_dir=folder.parents[2])
        assert cached == str(folder / name)


def test_what_is_there_is_verified_and_not_fetched_again(hub, to):
    folder = download(to)
    hub.sent.clear()
    seen = []

    @contextmanager
    def bar(what):
        yield lambda done, total: seen.append((what.split()[0], done, total))

    again = choose_place(look_up(NAME), to)
    assert again.missing == 0
    assert fetch(again, bar) == folder
    total = sum(file.size for file in again.offer.files)
    assert {what for what, _, _ in seen} == {"verifying"}
    assert seen[-1] == ("verifying", total, total)
    assert sha256((folder / SHARD).read_bytes()) not in hub.sent


def test_a_folder_appears_whole_and_alone(hub, hub_model, tmp_path):
    assert download("models/mine") == tmp_path / "models/mine"
    assert same_as(tmp_path / "models/mine", hub_model)
    assert not any(path.is_symlink() for path in Path("models/mine").iterdir())
    assert names_in(Path("models")) == ["mine"]  # neither store nor lock is left
    assert not Path("cache").exists()


@pytest.mark.parametrize("count", [30_000, 600_000])  # bytes: in the first shard, in the second
def test_an_interrupted_download_leaves_no_model_and_goes_on_later(hub, hub_model, to, count):
    waiting = choose_place(look_up(NAME), to)
    with pytest.raises(KeyboardInterrupt):
        fetch(waiting, stops_at(count))
    assert not waiting.folder.exists()
    with pytest.raises(FileNotFoundError):
        find_model(to or NAME)
    complete = {file.size for file in waiting.offer.files}
    (arrived,) = {part.stat().st_size for part in parts()} - complete  # one file is half there
    assert hub.ranges() == []

    again = choose_place(look_up(NAME), to)
    left = again.missing
    assert left == sum(file.size for file in again.offer.files) - sum(part.stat().st_size for part in parts())
    seen = []

    @contextmanager
    def bar(what):
        yield lambda done, total: seen.append((done, total)) if what.startswith("fetching") else None

    assert same_as(fetch(again, bar), hub_model)
    assert hub.ranges() == [f"bytes={arrived}-"]
    assert seen == sorted(seen)
    assert seen[-1] == (left, left)
    assert again.missing == 0
    assert parts() == []


def test_a_server_that_sends_only_whole_files(hub, hub_model, to):
    with pytest.raises(KeyboardInterrupt):
        fetch(choose_place(look_up(NAME), to), stops_at(60_000))
    hub.knows_ranges = False
    assert same_as(download(to), hub_model)


def test_a_part_that_is_longer_than_the_file(hub, hub_model):
    with pytest.raises(KeyboardInterrupt):
        fetch(choose_place(look_up(NAME)), stops_at(60_000))
    (part,) = [part for part in parts() if sha256((hub_model / SHARD).read_bytes()) in part.name]
    part.write_bytes(b"?" * 10_000_000)
    again = choose_place(look_up(NAME))
    assert again.missing == again.offer.nbytes - sum(other.stat().st_size for other in parts() if other != part)
    assert same_as(fetch(again), hub_model)


@pytest.mark.usefixtures("impatient")
def test_a_connection_that_stays_broken(hub, hub_model, to):
    waiting = choose_place(look_up(NAME), to)
    hub.stop_after = 50_000

    def break_down():
        hub.stop_after = 0

    hub.when_stopped = break_down
    with pytest.raises(ConnectionError, match=f"the connection to {hub.url} failed .*check the network") as error:
        fetch(waiting)
    one_sentence(error)
    assert not waiting.folder.exists()
    assert any(part.stat().st_size == 50_000 for part in parts())
    hub.stop_after = None
    assert same_as(download(to), hub_model)
    assert "bytes=50000-" in hub.ranges()


@pytest.mark.parametrize("name", [SHARD, "generation_config.json"])  # known by SHA-256, known by git's hash
def test_a_file_that_arrives_damaged_is_removed(hub, hub_model, to, name):
    hub.damaged = [name]
    waiting = choose_place(look_up(NAME), to)
    with pytest.raises(OSError, match=f"^{name} arrived damaged and was removed: run it again") as error:
        fetch(waiting)
    one_sentence(error)
    assert not waiting.folder.exists()
    hub.damaged = []
    hub.sent.clear()
    assert same_as(download(to), hub_model)
    assert (sha256((hub_model / SHARD).read_bytes()) in hub.sent) == (name == SHARD)


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_file_that_was_damaged_later_is_told_and_replaced_by_none(hub, hub_model, to, name):
    folder = download(to)
    path = (folder / name).resolve()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    culprit = path if to is None else folder
    with pytest.raises(OSError, match=f"is damaged, .*: remove {culprit} and run it again") as error:
        download(to)
    one_sentence(error)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"expected .*: remove {culprit} and run it again") as error:
        choose_place(look_up(NAME), to)
    one_sentence(error)
    path.unlink() if to is None else shutil.rmtree(folder)
    assert same_as(download(to), hub_model)


def test_a_full_disk_is_told_before_anything_is_fetched(hub, monkeypatch, to):
    offer = look_up(NAME)
    size = sum(file.size for file in offer.files)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(OSError, match=f"no room for {size:,} bytes, .* has {size - 1:,} left: make room") as error:
        choose_place(offer, to)
    one_sentence(error)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    assert choose_place(offer, to).missing == size
    assert not any(Path().rglob("*gemma*"))


def test_a_disk_that_fills_up_keeps_what_has_arrived(hub, hub_model, monkeypatch):
    class Full(refgemma.hub._Watched):
        def write(self, data, /):
            if self.tell() + len(data) > 40_000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    waiting = choose_place(look_up(NAME))
    with monkeypatch.context() as patch:
        patch.setattr("refgemma.hub._Watched", Full)
        with pytest.raises(OSError, match=r"cannot write .*refgemma-part: No space left on device; what has arrived"):
            fetch(waiting)
    assert any(part.stat().st_size == 40_000 for part in parts())
    assert same_as(download(), hub_model)


def test_a_new_revision_fetches_what_is_new(hub):
    old = download()
    hub.models[NAME]["files"]["generation_config.json"] = b'{"eos_token_id": [1, 107]}'
    hub.sent.clear()
    new = download()
    assert new != old
    assert find_model(NAME) == new
    assert json.loads((new / "generation_config.json").read_text()) == {"eos_token_id": [1, 107]}
    assert json.loads((old / "generation_config.json").read_text()) == {"eos_token_id": 1}
    assert sha256((new / SHARD).read_bytes()) not in hub.sent
    assert (new / SHARD).samefile(old / SHARD)


def test_a_system_without_links(hub, hub_model, monkeypatch):
    def symlink_to(self, target):
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    folder = download()
    assert same_as(folder, hub_model)
    assert find_model(NAME) == folder
    assert choose_place(look_up(NAME)).missing == 0
    assert download() == folder


def test_weights_that_do_not_fit_the_configuration_are_not_installed(hub, to):
    config = json.loads(hub.models[NAME]["files"]["config.json"])
    hub.models[NAME]["files"]["config.json"] = json.dumps(config | {"num_hidden_layers": 4}).encode()
    with pytest.raises(ValueError, match="does not fit its configuration"):
        download(to)
    with pytest.raises(FileNotFoundError):
        find_model(to or NAME)


def test_two_at_once(hub, hub_model, to):
    waiting = choose_place(look_up(NAME), to)
    waiting.store.mkdir(parents=True)
    lock = waiting.store.with_name(f"{waiting.store.name}.lock")
    with (
        WeakFileLock(lock),
        pytest.raises(OSError, match=f"^another process is downloading {NAME}: wait until it ends$"),
    ):
        fetch(waiting)
    assert same_as(fetch(waiting), hub_model)


@pytest.mark.parametrize("where", ["mine", "mine/config.json"])
def test_a_folder_that_holds_something_else_stays_as_it_is(hub, tmp_path, where):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    offer = look_up(NAME)
    with pytest.raises(
        ValueError, match=r"mine is not empty, and lacks token|config.json is a file: expected"
    ) as error:
        choose_place(offer, where)
    one_sentence(error)
    assert names_in(tmp_path / "mine") == ["config.json"]


def test_an_empty_folder_is_filled(hub, hub_model, tmp_path):
    (tmp_path / "mine").mkdir()
    assert same_as(download(tmp_path / "mine"), hub_model)


def test_the_home_folder_has_a_sign(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert choose_place(look_up(NAME), "~/mine").folder == tmp_path / "home/mine"


def refused(kind, words, name=NAME):
    """Look a model up, and see that it is refused in one sentence before any large file is asked for."""
    with pytest.raises(kind, match=words) as error:
        look_up(name)
    return one_sentence(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"config.json": b'{"model_type": "gemma2"}'},
            f"^{NAME} is not supported: model_type is 'gemma2': supported is",
        ),
        ({"config.json": b"{"}, f"^{NAME} is not supported: its config.json is not valid JSON"),
        ({"config.json": b"[]"}, f"^{NAME} is not supported: its config.json holds a JSON list"),
        ({"tokenizer.model": None}, f"^{NAME} lacks tokenizer.model .*: expected a model in Hugging Face layout"),
        (
            {"model.safetensors.index.json": None},
            rf"^{NAME} lacks model.safetensors \(there is gemma-0b-it.gguf, pytorch_model.bin\): expected",
        ),
        ({SHARD: None}, f"^{NAME} lacks {SHARD}"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../a.safetensors"}}'}, "names the shard '../a.safet"),
        ({"model.safetensors.index.json": b"[]"}, f"^{NAME}: model.safetensors.index.json is damaged"),
    ],
)
def test_a_model_that_cannot_run_is_refused_before_its_weights_are_fetched(hub, change, words):
    files = hub.models[NAME]["files"] | change
    hub.models[NAME]["files"] = {name: data for name, data in files.items() if data is not None}
    refused(ValueError, words)
    assert not any(path.endswith((".safetensors", "tokenizer.model")) for path, _ in hub.requests)


def test_a_hash_is_no_path(hub, monkeypatch):
    monkeypatch.setattr(hub, "commit", lambda name: "../../../home")
    refused(ValueError, "describes model.safetensors.index.json by commit '../../../home'")


@pytest.mark.parametrize("token", [None, NOT_ACCEPTED])
def test_a_gated_model(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    text = refused(PermissionError, f"^{NAME} is gated: accept its licence at {hub.url}/{NAME}, then log in")
    assert "hf auth login" in text
    assert "HF_TOKEN" in text


def test_a_model_that_is_not_gated_needs_no_token(hub, hub_model, monkeypatch):
    hub.models[NAME]["gated"] = False
    monkeypatch.delenv("HF_TOKEN")
    assert same_as(download(), hub_model)
    assert not any("Authorization" in headers for _, headers in hub.requests)


def test_the_token_is_shown_to_the_hub_alone(hub):
    download()
    shown = {("/cdn/" in path, "Authorization" in headers) for path, headers in hub.requests}
    assert shown == {(False, True), (True, False)}


def test_nothing_is_compressed_on_the_way(hub):
    """Or sizes and offsets would be those of the compressed file, which hubs make of JSON where they may."""
    download()
    assert {headers["Accept-Encoding"] for path, headers in hub.requests if "/api/" not in path} == {"identity"}


def test_there_is_no_second_progress_bar(hub, monkeypatch, capfd):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # has it drawn even where there is no terminal
    utils = huggingface_hub.utils
    download()
    assert capfd.readouterr() == ("", "")
    assert not utils.are_progress_bars_disabled("huggingface_hub.http_get")  # other users of the library keep theirs


@pytest.mark.parametrize("token", [True, False])
def test_an_unknown_model(hub, monkeypatch, token):
    if not token:
        monkeypatch.delenv("HF_TOKEN")
    refused(FileNotFoundError, f"^{hub.url} has no model google/gemma-3b, or it is private: check", "gemma-3b")


def test_a_token_that_is_not_valid(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_from_last_year")
    refused(PermissionError, f"^{hub.url} refuses the token: log in")


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "weights/google/gemma-2b", "..", "https://huggingface.co/google/gemma-2b"]
)
def test_what_is_no_name(hub, name):
    refused(ValueError, "is not the name of a model.*: expected OWNER/NAME", name)
    assert hub.requests == []


def test_the_owner_may_be_left_out(hub):
    assert look_up("gemma-0b-it") == look_up(NAME)


@pytest.mark.parametrize(
    ("card", "licence", "terms"),
    [
        ({"license": "gemma"}, "gemma", "https://ai.google.dev/gemma/terms"),
        (
            {"license": "other", "license_name": "mine", "license_link": "https://example.org/mine"},
            "mine",
            "https://example.org/mine",
        ),
        ({"license": "other", "license_name": "mine", "license_link": "LICENSE"}, "mine", "{page}"),
        ({"license": "mit"}, "mit", "{page}"),
        ({}, "not stated", "{page}"),
        (None, "not stated", "{page}"),
    ],
)
def test_the_licence(hub, card, licence, terms):
    hub.models[NAME]["card"] = card
    offer = look_up(NAME)
    assert (offer.licence, offer.terms) == (licence, terms.format(page=f"{hub.url}/{NAME}"))


def test_offline(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(ConnectionError, f"^HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it to download {NAME}$")
    assert hub.requests == []


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(ConnectionError, "^the connection to http://127.0.0.1:9 failed .*check the network and run it again$")


def test_a_hub_that_is_out_of_order(hub, monkeypatch):
    monkeypatch.setattr(hub, "describe", lambda name: {"message": "down for maintenance"})
    refused(ConnectionError, f"^the connection to {hub.url} failed")
    monkeypatch.setattr(hub, "out_of_order", 503)
    refused(ConnectionError, f"^{hub.url} answered 503 for {NAME} .*: try again later$")


def test_nothing_is_downloaded_by_itself(hub):
    with pytest.raises(FileNotFoundError, match="fetch one with `refgemma download OWNER/NAME`"):
        refgemma.load(NAME)
    assert hub.requests == []


def test_without_huggingface_hub(hub, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(ValueError, r'^downloading takes huggingface_hub, which is not installed: pip install "refgemma\[hub\]"$')
