"""Finetunes over HTTP: made, filled in either order, checked by the hosted rules, kept on disk, and used."""

import contextlib
import json
import shutil
import socket
import struct
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from refgemma.checkpoint.folder import default_places
from refgemma.workers_ai.pages import GEMMA_2B, GEMMA_7B
from refgemma.workers_ai.server import limits
from refgemma.workers_ai.server.adapter_check import _PLAIN
from refgemma.workers_ai.server.app import create_app
from tests.lora.test_hosted import write as write_hosted
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import ACCOUNT, RUN, ask, form, serving, wait_for

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PIRATE = next(place / "lora" / "pirate" for place in default_places() if (place / "lora" / "pirate").is_dir())
WHO = {"prompt": "Who are you?", "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "finetunes"


@pytest.fixture(scope="module")
def server(folder):
    """Without adapters; its application and its address."""
    app = create_app({GEMMA_2B: tiny_it(), GEMMA_7B: tiny_it()}, {}, finetunes=folder)
    with serving(app) as address:
        yield app, address


@pytest.fixture
def own(server, folder):
    """Address of the server, as if it had just been started: starting one for each test takes long."""
    app, address = server
    yield address
    app.state.service.ai.loras.clear()
    for finetune in folder.iterdir():
        shutil.rmtree(finetune)
    app.state.service.finetunes.__init__(app.state.service.ai, folder)


def create(address, name="sea", **fields):
    return ask(address, f"{ACCOUNT}/finetunes", {"model": GEMMA_2B, "name": name} | fields)


def upload(address, key, file_name, content):
    return ask(address, f"{ACCOUNT}/finetunes/{key}/finetune-assets", *form(file_name, content)[:1], headers=HEADERS)


HEADERS = form("", b"")[1]


def pirate(file_name):
    return (PIRATE / file_name).read_bytes()


def config(**changes):
    return json.dumps(json.loads(pirate(CONFIG)) | changes).encode()


def safetensors(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize("order", [(CONFIG, WEIGHTS), (WEIGHTS, CONFIG)])
@pytest.mark.parametrize("by", ["id", "name"])
def test_a_finetune_is_made_filled_and_used(own, ai, order, by):
    made = create(own, description="of the sea").result
    assert list(made) == ["id", "created_at", "model", "modified_at", "name", "public", "description"]
    assert str(uuid.UUID(made["id"])) == made["id"]
    key = made[by]
    for file_name in order:
        missing = ask(own, RUN, WHO | {"lora": key})
        assert (missing.status, missing.code) == (400, 3039)
        assert upload(own, key, file_name, pirate(file_name)).json == {"success": True}
    assert ask(own, RUN, WHO | {"lora": key}).result == ai.run(GEMMA_2B, WHO | {"lora": "pirate"})
    other = ask(own, f"{ACCOUNT}/run/{GEMMA_7B}", WHO | {"lora": key})
    assert (other.code, "was made for" in other.message) == (5006, True)


@pytest.mark.parametrize("path", ["finetunes", "finetunes/"])
def test_with_and_without_a_slash(own, path):
    assert ask(own, f"{ACCOUNT}/{path}", {"model": GEMMA_2B, "name": "a"}).result["name"] == "a"
    assert [finetune["name"] for finetune in ask(own, f"{ACCOUNT}/{path}").result] == ["a"]


def test_lists_and_public_ones(own, address):
    create(own, "mine"), create(own, "everybodys", public=True)
    names = [[f["name"] for f in ask(own, f"{ACCOUNT}/finetunes{end}").result] for end in ("", "/public")]
    assert names == [["mine", "everybodys"], ["everybodys"]]
    shipped = [f["name"] for f in ask(address, f"{ACCOUNT}/finetunes/public").result]
    assert shipped == ["pirate", "json", "letter"]


def test_an_id_of_the_command_line_works_like_its_name(address):
    finetune = ask(address, f"{ACCOUNT}/finetunes").result[0]
    assert finetune["name"] == "pirate"
    assert (
        ask(address, RUN, WHO | {"lora": finetune["id"]}).result == ask(address, RUN, WHO | {"lora": "pirate"}).result
    )


def test_finetunes_outlive_the_server(own, folder, ai):
    create(own), [upload(own, "sea", name, pirate(name)) for name in (CONFIG, WEIGHTS)]
    create(own, "half"), upload(own, "half", CONFIG, pirate(CONFIG))
    with serving(create_app({GEMMA_2B: tiny_it()}, {}, finetunes=folder)) as later:
        assert ask(later, f"{ACCOUNT}/finetunes").result == ask(own, f"{ACCOUNT}/finetunes").result
        assert ask(later, RUN, WHO | {"lora": "sea"}).result == ai.run(GEMMA_2B, WHO | {"lora": "pirate"})
        assert ask(later, RUN, WHO | {"lora": "half"}).code == 3039
        assert upload(later, "half", WEIGHTS, pirate(WEIGHTS)).status == 200


@pytest.mark.parametrize("broken", [b"{", b"[]", b'{"id": 1}', b'{"id": "../x"}'])
def test_a_description_that_somebody_changed_is_left_out(tmp_path, broken):
    folder = tmp_path / "finetunes"
    (folder / "f").mkdir(parents=True)
    (folder / "f" / "finetune.json").write_bytes(broken)
    with pytest.warns(UserWarning, match="left out"):
        app = create_app({GEMMA_2B: tiny_it()}, {}, finetunes=folder)
    assert app.state.service.finetunes.every() == []


@pytest.mark.parametrize(
    ("fields", "code", "status"),
    [
        ({"name": "../../x"}, 5006, 400),
        ({"name": ""}, 5006, 400),
        ({"name": "a" * 101}, 5006, 400),
        ({"name": "a\0b"}, 5006, 400),
        ({"name": 5}, 5006, 400),
        ({"name": None}, 5006, 400),
        ({"name": "cf-public-mine"}, 5006, 400),
        ({"name": "CF-Public-mine"}, 5006, 400),
        ({"name": ".hidden"}, 5006, 400),
        ({"name": ".new-x"}, 5006, 400),
        ({"description": "x" * 2000}, 5006, 400),
        ({"public": "yes"}, 5006, 400),
        ({"model": 3}, 5006, 400),
        ({"model": "@cf/meta/llama-2-7b-chat-hf-lora"}, 5005, 405),
    ],
)
def test_what_cannot_be_made(own, fields, code, status):
    reply = ask(own, f"{ACCOUNT}/finetunes", {"model": GEMMA_2B, "name": "x"} | fields)
    assert (reply.status, reply.code) == (status, code)
    assert ask(own, f"{ACCOUNT}/finetunes").result == []


def test_names_are_unique_and_ids_are_not_names(own):
    made = create(own).result
    assert create(own).code == create(own, made["id"]).code == 5006
    assert create(own, description="\ud800").code == 5006


def test_there_is_an_end_to_finetunes(own, monkeypatch):
    monkeypatch.setattr("refgemma.workers_ai.server.finetunes.FINETUNES", 1)
    create(own)
    assert (create(own, "second").status, create(own, "second").code) == (429, 3040)


def test_files_are_never_replaced(own, folder):
    create(own), upload(own, "sea", CONFIG, pirate(CONFIG))
    again = upload(own, "sea", CONFIG, config(lora_alpha=1))
    assert (again.status, again.code, "never replaced" in again.message) == (400, 5006, True)
    assert next(folder.glob(f"*/{CONFIG}")).read_bytes() == pirate(CONFIG)


HEADER = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": None}
ONE = {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("file_name", "content", "words"),
    [
        (CONFIG, b"{", "not valid JSON"),
        (CONFIG, b"[" * 100_000, "not valid JSON"),
        (CONFIG, b"{" + b" " * 1_100_000 + b"}", "1,000,000"),
        (CONFIG, config(r=16), "rank: 16, expected at most 8"),
        (CONFIG, config(r=10**400), "rank"),
        (CONFIG, config(model_type="llama"), "model_type: 'llama', expected 'gemma'"),
        (CONFIG, config(peft_type="IA3"), "peft_type"),
        (CONFIG, config(rank_pattern={"q_proj": 64}), "rank: 64"),
        (CONFIG, config(target_modules="(([a-z._0-9])+)+X"), "no other expressions"),
        (CONFIG, config(alpha_pattern={"(a|a)*$": 2}), "no other expressions"),
        (CONFIG, config(alpha_pattern={"a|" * 200: 2}), "no other expressions"),
        (CONFIG, config(target_modules="q_proj|v_proj"), "no other expressions"),
        (CONFIG, config(rank_pattern={"q" * 501: 2}), "no other expressions"),
        (CONFIG, config(rank_pattern={f"q{i}": 2 for i in range(201)}), "rank_pattern holds 201 names"),
        (CONFIG, config(lora_alpha="big"), "lora_alpha"),
        (CONFIG, config(use_qalora=True), "quantisation"),
        (WEIGHTS, b"", "is empty"),
        (WEIGHTS, b"\x80\x02}q\x00.", "pickled"),
        (WEIGHTS, b"PK\x03\x04" + b"\0" * 100, "pickled"),
        (WEIGHTS, struct.pack("<Q", 2**63) + b"{}", "safetensors"),
        (
            WEIGHTS,
            struct.pack("<Q", 5_000_000) + b"{" + b" " * 5_000_100,
            "a header of 5,000,000 bytes: expected at most 4,000,000",
        ),
        (WEIGHTS, safetensors(b"{" * 50_000), "damaged header"),
        (
            WEIGHTS,
            safetensors({"a": ONE | {"data_offsets": [0, 10**15]}}, b"\0" * 16),
            "but lies from byte 0 to 1000000000000000",
        ),
        (WEIGHTS, safetensors({"a": ONE, "b": ONE}, b"\0" * 16), "overlaps"),
        (WEIGHTS, safetensors({"a": ONE | {"data_offsets": [8, 24]}}, b"\0" * 24), "gap"),
        (WEIGHTS, safetensors({"a": ONE | {"shape": [2**40, 2**40]}}, b"\0" * 16), "shape"),
        (WEIGHTS, safetensors({"a": ONE | {"shape": [-1, -4]}}, b"\0" * 16), "shape"),
        (WEIGHTS, safetensors(b'{"a": 1, "a": 2}'), "twice"),
        (WEIGHTS, safetensors({}), "factors: none"),
        (WEIGHTS, safetensors(HEADER), "described by None"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused_and_leaves_nothing(own, folder, file_name, content, words):
    create(own)
    reply = upload(own, "sea", file_name, content)
    assert (reply.status, reply.code) == (400, 5006)
    assert words in reply.message
    assert str(folder) not in reply.message
    assert len(reply.body) < 3000
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["finetune.json"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_two_good_files_that_do_not_belong_together(own):
    create(own), upload(own, "sea", CONFIG, config(target_modules=["q_proj", "v_proj", "gate_proj"]))
    reply = upload(own, "sea", WEIGHTS, pirate(WEIGHTS))
    assert reply.code == 5006
    assert ask(own, RUN, WHO | {"lora": "sea"}).code == 3039


@pytest.mark.parametrize(
    ("key", "file_name", "code"),
    [
        ("nothing", CONFIG, 3037),
        ("..", CONFIG, 3037),
        ("..%2F..", CONFIG, 7000),
        ("sea", "../../evil.json", 5006),
        ("sea", "finetune.json", 5006),
        ("sea", "model.safetensors", 5006),
        ("sea", "/etc/passwd", 5006),
        ("sea", "adapter_config.json\0.safetensors", 5006),
    ],
)
def test_names_lead_nowhere(own, folder, key, file_name, code):
    create(own)
    before = sorted(folder.parent.rglob("*"))
    assert upload(own, key, file_name, pirate(CONFIG)).code == code
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"{}", {"content-type": "application/json"}),
        (b"", {"content-type": "multipart/form-data"}),
        (b"xxxx", {"content-type": "multipart/form-data; boundary=b"}),
        (b"--b\r\n\r\n", {"content-type": "multipart/form-data; boundary=b"}),
        (form(CONFIG, b"{}")[0][:-30], HEADERS),
        (form(CONFIG, b"{}")[0].replace(b'name="file"', b'name="other"'), HEADERS),
        (form("x" * 10_000, b"{}")[0], HEADERS),
        (form(CONFIG, b"{}")[0] * 50, HEADERS),
        (
            b"--b\r\n" + b"A" * 100_000 + b": 1\r\n\r\n\r\n--b--\r\n",
            {"content-type": "multipart/form-data; boundary=b"},
        ),
    ],
)
def test_a_form_that_is_none(own, folder, body, headers):
    create(own)
    reply = ask(own, f"{ACCOUNT}/finetunes/sea/finetune-assets", body, headers=headers)
    assert (reply.status, reply.code) == (400, 5006)
    assert not list(folder.glob(f"*/{WEIGHTS}"))


def test_an_upload_that_is_too_large(own):
    create(own)
    announced = {"content-length": str(limits.UPLOAD_BYTES + 1)} | HEADERS
    reply = ask(own, f"{ACCOUNT}/finetunes/sea/finetune-assets", b"--a-boundary", headers=announced)
    assert (reply.status, reply.code) == (413, 3006)


def test_uploads_leave_no_temporary_files(own, tmp_path, monkeypatch):
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    create(own), [upload(own, "sea", name, pirate(name)) for name in (WEIGHTS, CONFIG, CONFIG)]
    assert list(Path(place).iterdir()) == []


def test_an_adapter_of_the_hosted_model_is_taken_and_waits_for_it(own, tmp_path):
    """It keeps every rule; that a stand-in answers here is said when it is used."""
    folder = write_hosted(tmp_path)
    create(own)
    assert all(upload(own, "sea", name, (folder / name).read_bytes()).status == 200 for name in (CONFIG, WEIGHTS))
    reply = ask(own, RUN, WHO | {"lora": "sea"})
    assert (reply.code, f"does not fit {GEMMA_2B}" in reply.message) == (5006, True)
    assert ask(own, "/playground/api/info").json["loras"][0]["models"] == []


@pytest.mark.parametrize(
    "name", ["q_proj", "all-linear", "^model.layers.0.mlp$", r"model\.layers\.0\.self_attn\.q_proj$"]
)
def test_plain_names_are_taken(name):
    assert _PLAIN.fullmatch(name)


# ---- numbers that overflow


def scaled_weights(factor, part=""):
    """The pirate's file, with some factors multiplied."""
    tensors = load_file(PIRATE / WEIGHTS)
    return save({key: (value * np.float32(factor if part in key else 1)) for key, value in tensors.items()})


@pytest.mark.parametrize(
    ("changes", "weights", "words"),
    [
        ({}, scaled_weights(1e20), "numbers that overflow: the change of model.layers.0"),  # 1e40 at the most
        ({"lora_alpha": 1e38}, scaled_weights(100), "numbers that overflow: the change of model.layers.0"),
        ({"lora_alpha": 1e308}, scaled_weights(1), "numbers that overflow: the change of model.layers.0"),
        # No number of these, some 2e38, is out of range; what comes of them is. The pirate has DoRA's magnitudes.
        ({}, scaled_weights(1e38, "magnitude"), "no token can be chosen with it"),
    ],
)
@pytest.mark.parametrize("order", [(CONFIG, WEIGHTS), (WEIGHTS, CONFIG)])
def test_an_adapter_whose_numbers_overflow_is_refused(own, order, changes, weights, words):
    create(own)
    content = {CONFIG: config(**changes), WEIGHTS: weights}
    first, second = (upload(own, "sea", name, content[name]) for name in order)
    assert first.status == 200
    assert (second.status, second.code, words in second.message) == (400, 5006, True), second.message
    assert ask(own, RUN, WHO | {"lora": "sea"}).code == 3039


def test_a_large_adapter_within_range_is_taken(own):
    """The checks look for numbers that are none, not for good ones."""
    create(own), upload(own, "sea", CONFIG, config(lora_alpha=1e6))
    assert upload(own, "sea", WEIGHTS, pirate(WEIGHTS)).status == 200
    assert ask(own, RUN, WHO | {"lora": "sea", "max_tokens": 2}).status == 200


# ---- concurrency: only uploads to one finetune wait for each other


def test_lists_wait_for_no_upload(own, monkeypatch):
    """Everything but the second file of the same finetune goes on while a file is checked."""
    create(own), create(own, "other")
    entered, opened = threading.Event(), threading.Event()

    def slow(folder, gemma, model):
        if (folder / CONFIG).exists() and not entered.is_set():
            entered.set()
            assert opened.wait(60)

    monkeypatch.setattr("refgemma.workers_ai.server.finetunes.check", slow)
    with ThreadPoolExecutor(2) as pool:
        config_of_it = pool.submit(upload, own, "sea", CONFIG, pirate(CONFIG))
        try:
            assert entered.wait(60)
            weights_of_it = pool.submit(upload, own, "sea", WEIGHTS, pirate(WEIGHTS))
            assert len(ask(own, f"{ACCOUNT}/finetunes", timeout=20).result) == 2
            assert create(own, "third").status == 200
            assert upload(own, "other", WEIGHTS, pirate(WEIGHTS)).status == 200
            assert ask(own, RUN, WHO | {"lora": "other"}).code == 3039
            assert not config_of_it.done()
            assert not weights_of_it.done()
        finally:
            opened.set()
        assert config_of_it.result(60).status == weights_of_it.result(60).status == 200
    assert ask(own, RUN, WHO | {"lora": "sea"}).status == 200


def test_only_so_many_uploads_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("refgemma.workers_ai.server.finetunes.UPLOADS", 2)
    body, headers = form(CONFIG, pirate(CONFIG))
    path = f"{ACCOUNT}/finetunes/nothing/finetune-assets"
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    head = (head + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n").encode()
    with serving(create_app({GEMMA_2B: tiny_it()}, {}, finetunes=tmp_path)) as address, contextlib.ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(socket.create_connection((urlsplit(address).hostname, urlsplit(address).port)))
            assert ask(address, path, body, headers=headers).code == 3037  # there is room
            client.sendall(head + body[:-10])
        wait_for(lambda: ask(address, path, body, headers=headers, timeout=20).code == 3040)  # refused at once
        assert ask(address, path, body, headers=headers).status == 429
        client.sendall(body[-10:])
        wait_for(lambda: ask(address, path, body, headers=headers).code == 3037)


# ---- the folder


def stored(folder, id, **changes):
    fields = {"id": id, "created_at": "2026", "modified_at": "2026", "model": GEMMA_2B, "name": "sea"} | changes
    (folder / id).mkdir(parents=True)
    (folder / id / "finetune.json").write_text(json.dumps(fields))


def started(folder, loras=()):
    return create_app({GEMMA_2B: tiny_it()}, dict(loras), finetunes=folder).state.service.finetunes


def test_what_a_killed_process_left_is_removed(tmp_path):
    stored(tmp_path, "a")
    (tmp_path / ".new-x").mkdir()
    (tmp_path / ".new-x" / CONFIG).write_bytes(b"{")
    assert [finetune["id"] for finetune in started(tmp_path).every()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_of_two_finetunes_of_one_name_the_older_counts(tmp_path):
    stored(tmp_path, "a", created_at="2026-02"), stored(tmp_path, "b", created_at="2026-01")
    stored(tmp_path, "c", created_at="2025", name="b")  # the id of another
    with pytest.warns(UserWarning, match="left out: its name") as warned:
        finetunes = started(tmp_path)
    assert [finetune["id"] for finetune in finetunes.every()] == ["c", "b"]
    assert "a/finetune.json is left out: its name 'sea' is that of b, which is older" in str(warned[0].message)
    with pytest.warns(UserWarning, match="or was given at the start"):
        assert [f["name"] for f in started(tmp_path, {"sea": "pirate"}).every()] == ["sea", "b"]


def test_an_invalid_stored_name_is_left_out(tmp_path):
    stored(tmp_path, "a", name="../x")
    with pytest.warns(UserWarning, match="its name is not a valid name of a finetune"):
        assert started(tmp_path).every() == []
