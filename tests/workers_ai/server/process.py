"""``refgemma serve`` as a process on a free port."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@contextlib.contextmanager
def started(*options, until="playground:", **environment):
    """Address, what it printed, and the process, which is ended when the block is left."""
    command = [sys.executable, "-m", "refgemma", "serve", "--port", "0", *options]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "500"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            greeting = ""
            while until not in greeting:
                line = process.stdout.readline()
                assert line, process.stderr.read()
                greeting += line
            yield re.search(r"http://[\d.]+:\d+", greeting)[0], greeting, process
        finally:
            process.terminate()
            process.communicate()
