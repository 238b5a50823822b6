"""How much code a reader meets who follows one token: functions and files that one short `generate` enters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import refgemma

FUNCTIONS, FILES = 55, 18
ONCE = 5  # functions that the first call of a process enters beyond that: BLAS, the pool, the shapes of parts

_COUNT = """
import json, sys, threading
from pathlib import Path
import refgemma

root = str(Path(refgemma.__file__).parent)
gemma = refgemma.load("tiny-it")
entered = set()

def note(frame, event, argument):
    code = frame.f_code
    # Lambdas and comprehensions are part of the function around them; modules read on first use are not code that runs.
    if event == "call" and code.co_filename.startswith(root) and not code.co_name.startswith("<"):
        entered.add((code.co_filename[len(root) + 1 :], code.co_qualname))

def once():
    entered.clear()
    threading.setprofile(note)
    sys.setprofile(note)
    gemma.generate("What is 2 + 3?", max_tokens=2, temperature=0.0)
    sys.setprofile(None)
    return sorted(entered)

print(json.dumps([once(), once()]))
"""


def test_one_generate_enters_few_functions_in_few_files():
    """In a process of its own, so that no other test has warmed anything up."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "REFGEMMA_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, "-c", _COUNT], env=environment, check=True, timeout=60, stdout=subprocess.PIPE
    )
    first, later = json.loads(result.stdout)
    assert ["model.py", "forward"] in later  # the count sees what it should
    for entered, most in ((first, FUNCTIONS + ONCE), (later, FUNCTIONS)):
        names = [f"{file}: {name}" for file, name in entered]
        assert len(entered) <= most, names
        assert len({file for file, _ in entered}) <= FILES, names
    assert (Path(refgemma.__file__).parent / later[0][0]).exists()
