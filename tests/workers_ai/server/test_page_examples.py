"""Every example of the two model pages, run unchanged against a live server: only the base address is changed."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refgemma.workers_ai.pages import GEMMA_2B, GEMMA_7B
from refgemma.workers_ai.server.app import create_app
from tests.tiny_it import tiny_it
from tests.workers_ai.server import page_examples as page
from tests.workers_ai.server.live import ACCOUNT, PATIENCE, ask, events, serving
from tests.workers_ai.server.test_finetunes import CONFIG, WEIGHTS, create, pirate, upload

pytestmark = pytest.mark.clients
ENVIRONMENT = {"CLOUDFLARE_ACCOUNT_ID": "0123456789abcdef", "CLOUDFLARE_AUTH_TOKEN": "a-token"}


@pytest.fixture(scope="module")
def live():
    """Both models; answers need the token that the examples send."""
    models = dict.fromkeys((GEMMA_2B, GEMMA_7B), tiny_it())
    with serving(create_app(models, {}, token=ENVIRONMENT["CLOUDFLARE_AUTH_TOKEN"])) as address:
        yield address


@pytest.fixture(scope="module")
def unlocked():
    """The same without a token, for the binding, which has none."""
    with serving(create_app(dict.fromkeys((GEMMA_2B, GEMMA_7B), tiny_it()), {})) as address:
        yield address


def need(program):
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}, which is not installed")


def printed(command, **options):
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, check=True, **options
    )
    return done.stdout


def at(example, address):
    """The example with the base address changed."""
    assert example.count(page.BASE) == 1
    return example.replace(page.BASE, address)


def finetune(address):
    """Id of a registered finetune."""
    made = create(address, f"story-{len(ask(address, f'{ACCOUNT}/finetunes').result)}", model=GEMMA_7B).result
    assert all(upload(address, made["id"], name, pirate(name)).status == 200 for name in (CONFIG, WEIGHTS))
    return made["id"]


def is_answer(result):
    assert list(result) == ["response", "usage"]
    assert isinstance(result["response"], str)
    assert result["usage"]["completion_tokens"] >= 1  # the examples give no seed: the answer is random
    return True


def test_python(live):
    pytest.importorskip("requests", reason="needs requests (extra clients)")
    reply = ast.literal_eval(printed([sys.executable, "-c", at(page.PYTHON_2B, live)]))
    assert list(reply) == ["result", "success", "errors", "messages"]
    assert reply["success"]
    assert is_answer(reply["result"])


def test_curl_2b(live):
    need("curl")
    reply = json.loads(printed(["sh", "-c", at(page.CURL_2B, live)]))
    assert is_answer(reply["result"])


def test_curl_7b_with_the_placeholder(live):
    need("curl")
    reply = json.loads(printed(["sh", "-c", at(page.CURL_7B, live)]))
    assert [error["code"] for error in reply["errors"]] == [3037]
    assert f"Finetune {page.PLACEHOLDER} not found" in reply["errors"][0]["message"]


def test_curl_7b_with_a_registered_id(unlocked):
    need("curl")
    example = at(page.CURL_7B, unlocked).replace(page.PLACEHOLDER, finetune(unlocked))
    assert is_answer(json.loads(printed(["sh", "-c", example]))["result"])


@pytest.mark.parametrize("inputs", [page.UNSCOPED, page.MISTRAL_STYLE], ids=["unscoped", "Mistral style"])
def test_prompts(unlocked, inputs):
    assert is_answer(ask(unlocked, f"{ACCOUNT}/run/{GEMMA_7B}", inputs).result)


def worker(example, address, folder):
    """What a Worker of the pages responds, its types taken off, as a bundler would."""
    need("node")
    for types in page.TYPES:
        assert types in example
        example = example.replace(types, "")
    (folder / "worker.mjs").write_text(example, encoding="utf-8")
    shim = Path(__file__).with_name("worker_shim.mjs")
    return json.loads(printed(["node", str(shim), str(folder / "worker.mjs"), f"{address}{ACCOUNT}/run"]))


def test_worker_2b_streaming(unlocked, tmp_path):
    response = worker(page.WORKER_2B_STREAM, unlocked, tmp_path)
    assert response["type"] == "text/event-stream"
    *chunks, last, done = events(response["body"].encode())
    assert done == "[DONE]"
    assert all(list(chunk) == ["response"] for chunk in chunks)
    assert last["usage"]["completion_tokens"] >= 1


def test_worker_2b(unlocked, tmp_path):
    response = worker(page.WORKER_2B, unlocked, tmp_path)
    assert response["type"] == "application/json"
    assert is_answer(json.loads(response["body"]))


def test_worker_7b(unlocked, tmp_path):
    thrown = worker(page.WORKER_7B, unlocked, tmp_path)["thrown"]
    assert thrown.startswith("AiError: 3037: ")
    example = page.WORKER_7B.replace(page.PLACEHOLDER, finetune(unlocked))
    assert is_answer(json.loads(worker(example, unlocked, tmp_path)["body"]))
