"""A server that is stopped while it writes answers that would take much longer."""

import json
import signal
import subprocess
import sys
from contextlib import ExitStack

from tests.workers_ai.server.live import RUN, sent
from tests.workers_ai.server.process import ROOT

# The model never ends an answer by itself: of four at a time none is through its 8,000 tokens within the two seconds
# that a server gives them.
PROGRAM = """
from dataclasses import replace
import refgemma
from refgemma.workers_ai.pages import GEMMA_2B
from refgemma.workers_ai.server.app import create_app
from refgemma.workers_ai.server.start import serve
endless = replace(refgemma.load("tiny-it"), stop_ids=frozenset())
serve(create_app({GEMMA_2B: endless}, {}), port=0, on_ready=lambda address: print(address, flush=True))
"""


def test_sigterm_ends_streams_with_an_error_that_says_so():
    body = {"prompt": "a", "raw": True, "max_tokens": 8000, "stream": True}
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process, ExitStack() as stack:
        stack.callback(process.kill)
        address = process.stdout.readline().strip()
        responses = [stack.enter_context(sent(address, RUN, body | {"seed": seed})) for seed in range(1, 5)]
        for response in responses:
            response.readline()
        process.send_signal(signal.SIGTERM)
        last = [response.read().decode().split("\n\n")[-2].removeprefix("data: ") for response in responses]
        assert [json.loads(event)["errors"][0]["code"] for event in last] == [3008] * 4
        assert process.wait(60) in (0, -signal.SIGTERM)
