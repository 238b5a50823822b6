"""The page about local requests: its examples run, and give what the comments beside them say."""

import ast
import re
from pathlib import Path

import refgemma.workers_ai
from refgemma.workers_ai.pages import HOSTED, page

TEXT = (Path(refgemma.workers_ai.__file__).parent / "README.md").read_text(encoding="utf-8")


def test_the_examples_give_what_they_say(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names, compared = {}, 0
    for block in blocks:
        lines = block.split("\n")
        for node in ast.parse(block).body:
            code = ast.get_source_segment(block, node)
            value = eval(code, names) if isinstance(node, ast.Expr) else exec(code, names)
            said = lines[node.end_lineno] if node.end_lineno < len(lines) else ""
            if said.startswith("# "):
                # Of an assignment such as `(call,) = ...` the comment shows the name.
                value = names["call"] if isinstance(node, ast.Assign) else value
                assert repr(value) == said[2:]
                compared += 1
    assert (len(blocks), compared) == (2, 3)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == r"b'data: [DONE]\n\n'"
    assert printed[-1].startswith("5006 400 5006: Error: oneOf at '/' not met, 0 matches: ")


def test_the_table_of_schemas_says_what_the_data_say():
    newer, older = map(page, HOSTED)
    limits = [f"{one.fields('prompt')['prompt']['maxLength']:,}" for one in (newer, older)]
    assert f"| longest `prompt` or `content`, in code points | {' | '.join(limits)} |" in TEXT
    assert f"| context, in tokens | {newer.context:,} | {older.context:,} |" in TEXT
