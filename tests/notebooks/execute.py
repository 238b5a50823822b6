"""Run one notebook from top to bottom, as a reader would who solves no exercise, and look at what it leaves.

Each check runs twice: once before the hidden solution, where it must fail, since the answer is still missing; once
after it, where it must pass. REFGEMMA_COURSE_MODEL names another model to run it with. This is a process of its own, so
that nothing of Jupyter enters the tests'.
"""

import copy
import json
import os
import sys
from pathlib import Path

from tests.notebooks.check import kind

SECONDS_A_CELL = 120


def with_early_checks(cells):
    """The cells, with a copy of each check before its solution; that copy is allowed to fail."""
    out = []
    for i, cell in enumerate(cells):
        if kind(cell) == "solution":
            early = copy.deepcopy(cells[i + 1])
            early["id"] += "-early"
            early["metadata"]["tags"] = ["early", "raises-exception"]
            out.append(early)
        out.append(cell)
    return out


def with_model(cells, model):
    """The cells, with another model in the line that a reader would change."""
    if model is None:
        return cells
    lines = 'MODEL = "tiny-it"', f"MODEL = {model!r}"
    return [cell | {"source": "".join(cell["source"]).replace(*lines)} for cell in cells]


def complaints(cells):
    """Sentences on outputs that should not be there, and on checks that pass without an answer."""
    found = []
    for number, cell in enumerate(cells):
        outputs = cell.get("outputs", [])
        failed = any(output["output_type"] == "error" for output in outputs)
        if "early" in cell["metadata"].get("tags", ()):
            if not failed:
                found.append(f"the check {''.join(cell['source'])!r:.80} passes before there is an answer")
            continue
        for output in outputs:
            if output.get("name") == "stderr":
                found.append(f"cell {number} writes to stderr: {''.join(output['text'])!r:.300}")
    return found


def main(path, folder):
    """Execute the notebook in a folder; complaints go to stdout and make the exit status 1."""
    import nbformat  # here, because the default tests, which import every file, need no Jupyter
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    source = json.loads(Path(path).read_text(encoding="utf-8"))
    source["cells"] = with_early_checks(with_model(source["cells"], os.environ.get("REFGEMMA_COURSE_MODEL")))
    notebook = nbformat.reads(json.dumps(source), as_version=4)
    client = NotebookClient(notebook, timeout=SECONDS_A_CELL, resources={"metadata": {"path": folder}})
    try:
        client.execute()
    except CellExecutionError as error:
        print(error)
        return 1
    found = complaints(notebook["cells"])
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
