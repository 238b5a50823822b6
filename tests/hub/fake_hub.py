"""A model hub on the loopback interface: the few answers of huggingface.co that a download needs, and ways to fail.

As there, a large file is described by its SHA-256 and served by another host, which must not be shown the token, and a
small one by the hash that git gives it. Descriptions are public even where files are gated.
"""

import hashlib
import json
import shutil
import socket
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.checkpoint.files import write_shards
from tests.models import random_model

NAME = "google/gemma-0b-it"
ACCEPTED, NOT_ACCEPTED = "hf_accepted", "hf_not_accepted"  # tokens of accounts that did and did not accept licences
LARGE = 2000  # bytes
BLOCK = 10_000  # bytes sent at a time


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class FakeHub:
    """Its models by name, each ``{"files": {name: bytes}, "card": dict, "gated": False or "manual"}``, and its log."""

    def __init__(self, url):
        self.url = url
        self.models = {}
        self.requests = []  # (path, headers)
        self.sent = {}  # bytes of each large file, by its hash
        self.knows_ranges = True
        self.stop_after = None  # bytes of an answer, before which large files are not cut off
        self.when_stopped = lambda: None
        self.damaged = ()  # names of files that arrive with another last byte
        self.out_of_order = 0  # or a status

    def add(self, name, folder, *, gated=False, card=None, **more):
        """A model from a folder; `more` are files beside it."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()} | more
        self.models[name] = {"files": files, "gated": gated, "card": {"license": "gemma"} if card is None else card}
        return self.models[name]

    def commit(self, name):
        """A hash of everything in the model."""
        files = sorted(self.models[name]["files"].items())
        return hashlib.sha1(repr([(file, sha256(data)) for file, data in files]).encode()).hexdigest()

    def asked_for(self, name):
        """Whether this file was."""
        return any(path.endswith(f"/{name}") for path, _ in self.requests)

    def ranges(self):
        """The parts that were asked for."""
        return [headers["Range"] for path, headers in self.requests if "Range" in headers and "/cdn/" in path]

    def describe(self, name):
        """What ``/api/models/NAME?blobs=true`` says."""
        model = self.models[name]
        siblings = []
        for file, data in model["files"].items():
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            siblings.append({"rfilename": file, "size": len(data), "blobId": git})
            if len(data) >= LARGE:
                siblings[-1] |= {
                    "blobId": "0" * 40,
                    "lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 9},
                }
        about = {"_id": "1", "id": name, "sha": self.commit(name), "siblings": siblings, "tags": [], "private": False}
        return about | {"gated": model["gated"], "cardData": model["card"]}


@contextmanager
def running():
    """A hub that answers while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hub.requests.append((self.path, self.headers))
            path = unquote(urlsplit(self.path).path)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if path.startswith("/cdn/"):
                self.do_large(path.removeprefix("/cdn/"), token)
            elif token not in ("", ACCEPTED, NOT_ACCEPTED):
                self.refuse(401, message="Invalid credentials in Authorization header")
            elif hub.out_of_order:
                self.refuse(hub.out_of_order, message="we are working on it")
            elif path.startswith("/api/models/"):
                self.do_model(path.removeprefix("/api/models/"), token)
            else:
                self.do_file(*path.removeprefix("/").partition("/resolve/")[::2], token)

        def do_model(self, name, token):
            if name in hub.models:
                self.answer(json.dumps(hub.describe(name)).encode())
            else:
                self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")

        def do_file(self, name, rest, token):
            commit, _, file = rest.partition("/")
            if name not in hub.models or commit != hub.commit(name):
                self.refuse(404, "RevisionNotFound")
            elif hub.models[name]["gated"] and token != ACCEPTED:
                self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted")
            elif file not in hub.models[name]["files"]:
                self.refuse(404, "EntryNotFound")
            elif len(data := hub.models[name]["files"][file]) < LARGE:
                self.answer(data[:-1] + b"?" if file in hub.damaged else data)
            else:
                self.send_response(302)
                self.send_header("Location", f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{sha256(data)}")
                self.end_headers()

        def do_large(self, digest, token):
            if token:
                self.refuse(400, message="a token was sent to another host")
                return
            files = [item for model in hub.models.values() for item in model["files"].items()]
            name, data = next((name, data) for name, data in files if sha256(data) == digest)
            if name in hub.damaged:
                data = data[:-1] + b"?"
            first = 0
            if hub.knows_ranges and "Range" in self.headers:
                first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data) - first))
            self.end_headers()
            for start in range(first, len(data), BLOCK):
                if hub.stop_after is not None and start >= first + hub.stop_after:
                    self.wfile.flush()
                    hub.when_stopped()
                    return
                block = data[start : start + BLOCK]
                self.wfile.write(block)
                hub.sent[digest] = hub.sent.get(digest, 0) + len(block)

        def answer(self, data):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def refuse(self, status, code="", message=""):
            self.send_response(status)
            for header, value in (("X-Error-Code", code), ("X-Error-Message", message)):
                if value:
                    self.send_header(header, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            if not isinstance(sys.exception(), ConnectionError):  # the other side may hang up
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="session")
def hub_model(tmp_path_factory, small_tokenizer):
    """Folder of a random model in bfloat16, in three shards, as on the hub."""
    model = random_model(2, vocab_size=small_tokenizer.vocab_size, num_layers=3, max_positions=96)
    folder = write_shards(tmp_path_factory.mktemp("hub") / "model", model, "BF16")
    shutil.copy(small_tokenizer.path, folder / "tokenizer.model")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch, hub_model):
    """A running hub with the model above and files that nobody needs; an empty cache; no way to any other host."""
    strangers = []

    def only_here(host, *rest, **options):
        if host not in ("127.0.0.1", "localhost"):
            strangers.append(host)
            raise OSError(f"{host} is not to be reached from a test")
        return look_up_address(host, *rest, **options)

    look_up_address = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_HOME", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with running() as hub:
        # What it reads from the environment when it is imported, which may have been long ago.
        for name, value in {
            "ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "DOWNLOAD_CHUNK_SIZE": BLOCK,
        }.items():
            monkeypatch.setattr(constants, name, value)
        unwanted = {"pytorch_model.bin": b"pickled" * 1000, "gemma-0b-it.gguf": b"GGUF" * 5000, "README.md": b"# Gemma"}
        hub.add(NAME, hub_model, gated="manual", **unwanted)
        monkeypatch.setenv("HF_TOKEN", ACCEPTED)
        yield hub
        if hasattr(huggingface_hub, "close_session"):  # of version 1 and later
            huggingface_hub.close_session()
    assert strangers == []
