"""The house stays small, its words plain, and what README says of its size true."""

import ast
import re
from pathlib import Path

import pytest

import refgemma

PACKAGE = Path(refgemma.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A little above what there is: a change that needs more says why.
MOST_LINES = 26_400
MOST_FILES = 171
MOST_PROSE = 0.45  # lines of docstrings and comments for each line of code

# Words that read as translated, or that say "reference" and "candidate" in four ways.
RETIRED = (
    r"\bours\b",
    r"\btheirs\b",
    r"\btold\b(?! apart)",
    r"\bhands\b",
    r"\bstands\b(?! for)",
    r"(?<![Tt]here )\bis no (?!longer\b|more\b|less\b|need\b|room\b|better\b)",
    r"\bso many\b",
    r"\bsome times\b",
    r"\bno telling\b",
    r"\badmit",
    r"let_go",
    r"_sorry",
    r", too\b(?! (?:many|large|coarse|long|few|small|much))",
    r"\bwhoever\b",
)
# Keys of JSON output that programs may read, of files written before, and of other projects' names.
KEPT = {
    "refgemma/cli/inspect.py": ('"ours"', '"theirs"'),
    "refgemma/oracle/published/verify.py": ('"ours"',),
}
# Names of files whose purpose nobody guesses.
RETIRED_FILES = {
    "patient", "known", "stored", "theirs", "places", "placing", "sites", "changes", "departures", "setups", "by_hand",
    "parting", "outcomes", "borders", "sidecar", "pieces", "look", "turns",
}  # fmt: skip


def counted(source):
    """Lines of code, and lines of docstrings and comments."""
    lines, prose = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                prose |= set(range(first.lineno, first.end_lineno + 1))
    full = [(number in prose or line.lstrip().startswith("#")) for number, line in enumerate(lines, 1) if line.strip()]
    return full.count(False), full.count(True)


def test_the_package_is_no_larger_than_it_says():
    assert len(SOURCES) <= MOST_FILES
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES) <= MOST_LINES


def test_prose_does_not_bury_the_code():
    code, prose = map(sum, zip(*(counted(path.read_text(encoding="utf-8")) for path in SOURCES), strict=True))
    assert prose <= MOST_PROSE * code
    assert counted('"""One."""\n\n# two\nx = 1  # three\n') == (1, 2)


def written():
    """What a person reads: code, pages and notebooks."""
    yield from SOURCES
    yield from PACKAGE.rglob("*.js")
    yield from (path for folder in (PACKAGE, ROOT / "notebooks", ROOT / "weights") for path in folder.rglob("*.md"))
    yield from (ROOT / "notebooks").glob("*.ipynb")
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md"))


@pytest.mark.parametrize("word", RETIRED)
def test_retired_words_do_not_come_back(word):
    found = []
    for path in written():
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for kept in KEPT.get(name, ()):
                line = line.replace(kept, "")
            if re.search(word, line):
                found.append(f"{name}:{number}: {line.strip():.100}")
    assert found == []


def test_a_retired_word_is_found():
    for line, word in (
        ("theirs is no array", r"\btheirs\b"),
        ("x is no array", RETIRED[5]),
        ("this, too", RETIRED[12]),
    ):
        assert re.search(word, line)
    assert not re.search(RETIRED[5], "it is no longer read")


def test_files_have_names_that_say_what_they_hold():
    assert [path.name for path in SOURCES if path.stem in RETIRED_FILES or path.stem.startswith("trial")] == []


def test_readme_is_short_and_counts_its_evening_right():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    evening = re.search(r"An evening covers (.*?), ([\d,]+) lines", readme, re.DOTALL)
    files = []
    for name in re.findall(r"`([^`]+)`", evening[1]):
        files += sorted((PACKAGE / name).glob("*.py")) if name.endswith("/") else [PACKAGE / name]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert abs(lines - int(evening[2].replace(",", ""))) <= 0.03 * lines
