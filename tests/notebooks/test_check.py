"""Every notebook keeps the rules of `check`, and each rule sees the notebook that breaks it."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from tests.notebooks.check import MOST_LINES, main, normal_form, problems

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cell(kind, source, tags=()):
    jupyter = {"jupyter": {"source_hidden": True}} if "solution" in tags else {}
    metadata = ({"tags": list(tags)} if tags else {}) | jupyter
    name = hashlib.sha256(f"{kind}{source}{tags}".encode()).hexdigest()[:8]
    return {"cell_type": kind, "id": name, "metadata": metadata, "source": source}


def good_cells():
    """A notebook that has all it must have and nothing else."""
    exercises = [
        c
        for n in (1, 2)
        for c in (
            cell("markdown", f"### Exercise {n}. Count\nHow many?"),
            cell("code", f"count_{n} = ...", ["exercise"]),
            cell("code", f"if count_{n} is ...:\n    count_{n} = {n}", ["solution"]),
            cell("code", f"assert count_{n} == {n}\nprint('count_{n}', 'is', 'right')", ["check"]),
        )
    ]
    top = [cell("markdown", "# 1. Counting\n## Goals\n- count"), cell("code", 'MODEL = "tiny-it"  # or another')]
    return [*top, *exercises, cell("markdown", "## References\n- Iverson, 1962.")]


def written(cells):
    return normal_form({"cells": cells})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_the_rules(path):
    assert problems(path.read_text(encoding="utf-8")) == []


def test_a_good_notebook_has_no_problems():
    assert problems(written(good_cells())) == []


def change(index, **fields):
    def apply(cells):
        cells[index] = cells[index] | fields
        return cells

    return apply


def insert(*new):
    return lambda cells: [*cells[:2], *new, *cells[2:]]


def remove(index):
    return lambda cells: [*cells[:index], *cells[index + 1 :]]


BROKEN = {
    "no goals": (change(0, source="# 1. Counting"), "learning goals"),
    "no title": (change(0, source="## Goals\n- count"), "title"),
    "no references": (lambda cells: cells[:-1], "References"),
    "reference without a year": (change(-1, source="## References\n- Iverson."), "dated"),
    "no model": (change(1, source="import numpy"), "MODEL"),
    "another model": (change(1, source='MODEL = "google/gemma-2b"'), "MODEL"),
    "long cell": (insert(cell("code", "x = 1\n" * (MOST_LINES + 1))), "lines"),
    "long text": (insert(cell("markdown", "x\n" * (MOST_LINES + 1))), "lines"),
    "wide line": (insert(cell("code", "x = " + " + ".join(["1"] * 40))), "characters"),
    "magic": (insert(cell("code", "%timeit 1")), "plain Python"),
    "shell": (insert(cell("code", "!pip list")), "plain Python"),
    "picture without axes": (insert(cell("code", "fig, ax = plt.subplots()\nax.set_title('x')")), "xlabel"),
    "one exercise": (lambda cells: [*cells[:6], cells[-1]], "two or more"),
    "exercise without a check": (remove(5), "belong to no"),
    "exercise answered": (change(3, source="count_1 = 1"), "no ... for the answer"),
    "shown solution": (lambda cells: change(4, metadata={"tags": ["solution"]})(cells), "source_hidden"),
    "solution that replaces an answer": (change(4, source="count_1 = 1"), "replace"),
    "check of nothing": (change(5, source="print(count_1)"), "asserts nothing"),
    "same id": (lambda cells: change(2, id=cells[0]["id"])(cells), "same id"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_sees_the_notebook_that_breaks_it(name):
    breaks, word = BROKEN[name]
    found = problems(written(breaks(good_cells())))
    assert any(word in problem for problem in found), found


@pytest.mark.parametrize(
    "leftover",
    [
        {"outputs": [{"output_type": "stream", "name": "stdout", "text": ["1"]}]},
        {"execution_count": 3},
        {"metadata": {"tags": [], "scrolled": True}},
    ],
    ids=["output", "count", "metadata"],
)
def test_what_running_leaves_is_seen_and_taken_out(tmp_path, leftover):
    notebook = json.loads(written(good_cells()))
    notebook["cells"][1] |= leftover
    path = tmp_path / "run.ipynb"
    path.write_text(json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    assert any("normal form" in problem for problem in problems(path.read_text(encoding="utf-8")))
    assert main([str(path)]) == 1
    assert main(["--fix", str(path)]) == 0
    assert problems(path.read_text(encoding="utf-8")) == []


def test_other_layouts_of_the_same_json_are_seen():
    text = written(good_cells())
    for other in (text.rstrip("\n"), json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"):
        assert any("normal form" in problem for problem in problems(other))


def test_readme_lists_every_notebook_and_its_links_lead_somewhere():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (FOLDER / link).exists()] == []
    assert [path.name for path in NOTEBOOKS if path.name not in local] == []
