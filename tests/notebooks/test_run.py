"""The notebooks run from top to bottom, and so do the solutions of their exercises."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.notebooks.execute import complaints, with_early_checks, with_model
from tests.notebooks.test_check import FOLDER, NOTEBOOKS, good_cells, written

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2  # processes at a time; each notebook has a kernel beside it


def environment(folder):
    """Variables of a process that finds this project, and nothing that a user's own Jupyter was told."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    places = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    return os.environ | places | {"PYTHONPATH": path, "IPYTHONDIR": str(folder / "ipython")}


def run(path, folder):
    """Execute one notebook in a folder of its own; what it complained of."""
    work = folder / path.stem
    work.mkdir()
    command = [sys.executable, "-m", "tests.notebooks.execute", str(path), str(work)]
    done = subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.fixture(scope="session")
def executed(request, tmp_path_factory):
    """Results to come, of the notebooks that were asked for."""
    pytest.importorskip("nbclient", reason="needs Jupyter: pip install refgemma[notebooks]")
    pytest.importorskip("matplotlib.font_manager")  # finds the fonts once, and says so on stderr where it is new
    folder = tmp_path_factory.mktemp("notebooks")
    items = [item for item in request.session.items if item.originalname == "test_notebook_runs"]
    with ThreadPoolExecutor(WORKERS) as pool:
        yield {path: pool.submit(run, path, folder) for path in (item.callspec.params["path"] for item in items)}


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, executed):
    complaint = executed[path].result()
    assert not complaint, complaint


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """The text of each page that the README's commands make of a course of one small notebook, by folder."""
    pytest.importorskip("nbconvert", reason="needs Jupyter: pip install refgemma[notebooks]")
    root = tmp_path_factory.mktemp("pages")
    shutil.copytree(FOLDER / "html", root / "notebooks" / "html")
    (root / "notebooks" / "one.ipynb").write_text(written(good_cells()), encoding="utf-8")
    readme = (FOLDER / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^jupyter (nbconvert .*)$", readme, re.MULTILINE)
    for command in commands:
        line = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(line, cwd=root, env=environment(root), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert len(commands) == 2
    return {page.parent.name: page.read_text(encoding="utf-8") for page in root.glob("build/*/one.html")}


@pytest.mark.notebooks
def test_pages_fold_solutions_and_what_the_checks_print(pages):
    folded = re.findall(r"<details.*?</details>", pages["course"], re.DOTALL)
    open_ = re.sub(r"<details.*?</details>", "", pages["course"], flags=re.DOTALL)
    assert [word in "".join(folded) for word in ("count_1 is right", "count_2 is right")] == [True, True]
    assert pages["course"].count("<details") == 4  # two exercises: a solution and a check each
    assert "is right" not in open_
    assert "How many?" in open_


@pytest.mark.notebooks
def test_pages_to_hand_out_hold_neither(pages):
    assert "<details" not in pages["handout"]
    assert "is right" not in pages["handout"]
    assert "How many?" in pages["handout"]


def with_outputs(cells, **outputs):
    """The cells, some of them with one output each; keys are the names of cells in the JSON."""
    return [cell | {"outputs": [outputs[cell["id"]]]} if cell["id"] in outputs else cell for cell in cells]


def test_checks_that_pass_before_there_is_an_answer_are_seen():
    cells = with_early_checks(good_cells())
    early = [cell["id"] for cell in cells if cell["id"].endswith("-early")]
    failed = {name: {"output_type": "error"} for name in early}
    assert complaints(with_outputs(cells, **failed)) == []
    del failed[early[0]]
    assert len(complaints(with_outputs(cells, **failed))) == 1


def test_warnings_in_outputs_are_seen():
    cells = good_cells()
    for stream, count in (("stdout", 0), ("stderr", 1)):
        output = {"output_type": "stream", "name": stream, "text": "UserWarning: a glyph is missing"}
        assert len(complaints(with_outputs(cells, **{cells[1]["id"]: output}))) == count


def test_the_model_line_is_the_one_that_changes():
    cells = with_model(good_cells(), "google/gemma-2b-it")
    assert cells[1]["source"] == "MODEL = 'google/gemma-2b-it'  # or another"
    assert [cell["source"] for cell in cells[2:]] == [cell["source"] for cell in good_cells()[2:]]
