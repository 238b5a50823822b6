"""What every notebook of the course keeps to, checked in its JSON: no Jupyter is needed.

``python tests/notebooks/check.py FILES`` tells what is wrong; with ``--fix`` it first writes each file in normal form.
"""

import ast
import hashlib
import json
import re
import sys
from pathlib import Path

MOST_LINES = 15  # of a cell
WIDEST = 100  # characters of a code line: what a browser shows without scrolling
EXERCISE = ("markdown", "exercise", "solution", "check")  # four cells in a row make one
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def normal_form(notebook):
    """The text of the file: nothing that running leaves behind, keys sorted, one space a level, as Jupyter saves it."""
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        kept = {key: value for key, value in cell["metadata"].items() if key in ("tags", "jupyter")}
        clean = {
            "cell_type": cell["cell_type"],
            "id": cell.get("id") or hashlib.sha256(source.encode()).hexdigest()[:8],
            "metadata": kept,
            "source": source.splitlines(keepends=True),
        }
        if cell["cell_type"] == "code":
            clean |= {"execution_count": None, "outputs": []}
        cells.append(clean)
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def kind(cell):
    """``markdown``, or what a code cell is for: ``exercise``, ``solution``, ``check``, else ``code``."""
    if cell["cell_type"] != "code":
        return cell["cell_type"]
    return next((tag for tag in EXERCISE[1:] if tag in cell["metadata"].get("tags", ())), "code")


def problems(text):
    """Sentences on what is wrong with a notebook, given as the text of its file."""
    notebook = json.loads(text)
    cells = notebook["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    kinds = [kind(cell) for cell in cells]
    found = []
    if text != normal_form(notebook):
        found.append("not in normal form, or it holds outputs: run python tests/notebooks/check.py --fix on it")
    if len({cell.get("id") for cell in cells}) < len(cells):
        found.append("two cells have the same id")
    if kinds[0] != "markdown" or not sources[0].startswith("# ") or "## Goals" not in sources[0]:
        found.append("the first cell is not a title (# ...) with learning goals (## Goals)")
    if not re.match(r"## References\n(.*\n)*.*\b(19|20)\d\d\b", sources[-1]):
        found.append("the last cell is not ## References with at least one dated work")
    first_code = sources[kinds.index("code")] if "code" in kinds else ""
    if not re.search(r'^MODEL = "tiny-it"', first_code, re.MULTILINE):
        found.append('the first code cell does not hold the line MODEL = "tiny-it"')
    for number, source in enumerate(sources):
        if len(source.splitlines()) > MOST_LINES:
            found.append(f"cell {number} has {len(source.splitlines())} lines: at most {MOST_LINES}, one idea")
        if kinds[number] != "markdown":
            found += [f"cell {number} {problem}" for problem in code_problems(source)]
    return found + exercise_problems(cells, sources, kinds)


def code_problems(source):
    """What is wrong with one code cell."""
    try:
        ast.parse(source)
    except SyntaxError:
        return ["is not plain Python: no magics, no shell"]
    found = []
    if any(len(line) > WIDEST for line in source.splitlines()):
        found.append(f"has a line of over {WIDEST} characters")
    if "plt.subplots" in source and not all(word in source for word in ("title", "xlabel", "ylabel")):
        found.append("draws a picture without title, xlabel and ylabel")
    return found


def exercise_problems(cells, sources, kinds):
    """What is wrong with the exercises."""
    found = []
    starts = [i for i, source in enumerate(sources) if re.match(r"### Exercise \d+", source)]
    if len(starts) < 2:
        found.append(f"has {len(starts)} exercises (### Exercise 1 ...): expected two or more")
    if any(kinds.count(tag) != len(starts) for tag in EXERCISE[1:]):
        found.append("has cells tagged exercise, solution or check that belong to no ### Exercise")
    for number, start in enumerate(starts, 1):
        where = f"exercise {number}"
        if tuple(kinds[start : start + 4]) != EXERCISE or not sources[start].startswith(f"### Exercise {number}"):
            found.append(f"{where} is not text, then the cells tagged exercise, solution and check")
            continue
        if "..." not in sources[start + 1]:
            found.append(f"{where} has no ... for the answer")
        if not cells[start + 2]["metadata"].get("jupyter", {}).get("source_hidden"):
            found.append(f"{where} shows its solution: it needs source_hidden")
        if not re.match(r"if .* is \.\.\.:", sources[start + 2]):
            found.append(f"{where}: the solution does not begin with if ... is ...:, so it would replace an answer")
        if "assert " not in sources[start + 3]:
            found.append(f"{where} asserts nothing")
    return found


def main(arguments):
    """Check files; the exit status says whether all are well."""
    fix = "--fix" in arguments
    wrong = 0
    for path in [Path(argument) for argument in arguments if argument != "--fix"]:
        text = path.read_text(encoding="utf-8")
        if fix and text != normal_form(json.loads(text)):
            text = normal_form(json.loads(text))
            path.write_text(text, encoding="utf-8")
        for problem in problems(text):
            print(f"{path}: {problem}")
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
