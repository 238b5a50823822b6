"""Write the published data of the formula models: ``python -m tests.oracle.publish [FOLDER]``.

For each model a JSON file (how to make its weights, the batch, the logits, how far a correct float32 engine may be from
them) and a trace; and the table of coverage: how far each known bug moves the logits, in multiples of that budget.
Without FOLDER it also writes the page of the bug catalogue.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.config import to_json
from refgemma.numerics import FLOAT32, FLOAT64, Array, Numerics
from refgemma.oracle.bugs import catalogue
from refgemma.oracle.bugs.catalogue import BUGS, with_bugs
from refgemma.oracle.bugs.port import Setup, run
from refgemma.oracle.diagnosis.by_logits import LogitsTrial
from refgemma.oracle.diagnosis.explanation import fits, honest_setup
from refgemma.oracle.formula_models import formula
from refgemma.oracle.formula_models.formula import EVERY, MODELS, QUIET, FormulaModel, tensors_of
from refgemma.oracle.traces.trace import Trace

FOLDER = Path(formula.__file__).parent / "data"
BUGS_PAGE = Path(catalogue.__file__).parent / "README.md"
_DIGITS = 12  # of a logit; the budget begins at the seventh

_FORMULA = (
    "number n of tensor t, in 32-bit unsigned arithmetic: x = 0x9E3779B9 * (t + 1) + n; "
    "x = (x ^ x >> 16) * 0x7FEB352D; x = (x ^ x >> 15) * 0x846CA68B; b = (x ^ x >> 16) >> 24; "
    "the weight is (2 b - 255) / 2**exponent, or b / 2**exponent where signed is false"
)


def trace_of(model: FormulaModel, numerics: Numerics = FLOAT64) -> tuple[Trace, Setup]:
    """Every tensor of a model's batch, and the setup that computes them."""
    nothing = Trace({}, {}, model.tokens, model.positions, model.config)
    setup = honest_setup(model.params, model.config, nothing, "float32").but(numerics=numerics)
    tensors: dict[str, Array] = {}

    def tap(name: str, value: Array) -> Array:
        tensors[name] = np.array(value)
        return value

    run(setup, tap)
    allowed = (model.positions[:, None, :] >= 0) & (model.positions[:, None, :] <= model.positions[:, :, None])
    for name in tensors:
        if name.endswith("attn.scores"):
            tensors[name] = np.where(allowed[:, None], tensors[name], 0)
        elif not name.endswith("attn.probs"):
            tensors[name][model.positions < 0] = 0
    meta = {"model": model.name, "numerics": numerics.name}
    dtypes = dict.fromkeys(tensors, numerics.dtype.name)
    return Trace(tensors, dtypes, model.tokens, model.positions, model.config, meta), setup


def page_of(model: FormulaModel) -> dict[str, Any]:
    """Everything that is published about a model."""
    trace, setup = trace_of(model)
    budgets = LogitsTrial(trace, setup, "float32").budgets(setup)  # BT
    return {
        "name": model.name,
        "title": model.title,
        "config": to_json(model.config),
        "formula": _FORMULA,
        "quiet": f"rows v of the embedding table with v % {EVERY} == 5 are then multiplied by 2**-{QUIET}",
        "adapter": "embed += (row v of lora_a^T) lora_b^T, before sqrt(D) multiplies both" if model.rank else None,
        "tensors": [asdict(tensor) | {"sum": _sum(tensor.values, tensor.exponent)} for tensor in tensors_of(model)],
        "tokens": model.tokens.tolist(),
        "positions": model.positions.tolist(),
        "logits": [[[_short(x) for x in row] for row in rows] for rows in trace.tensors["logits"].tolist()],
        "float32_budget": [[float(f"{x:.2g}") for x in rows] for rows in budgets.tolist()],
    }


def coverage() -> Iterator[tuple[str, str, dict[str, float]]]:
    """How far each known bug moves the logits."""
    models = []
    for model in MODELS:
        trace, honest = trace_of(model)
        models.append((model, trace, honest, LogitsTrial(trace, honest, "float32").budgets(honest)))
    for bug in BUGS:
        effects: dict[str, float] = {}
        for model, trace, honest, budgets in models:
            real = model.positions >= 0
            moved = [
                np.abs(run(setup) - trace.tensors["logits"]).max(axis=-1)[real] / budgets[real]  # real positions
                for setup in with_bugs(honest, [bug])
                if fits(setup.tokens, trace)
            ]
            if moved:
                effects[model.name] = min(float(one.max()) for one in moved)
        yield bug.key, bug.title, effects


def coverage_table() -> str:
    """Coverage as Markdown."""
    names = [model.name for model in MODELS]
    lines = [f"| bug | | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for key, title, effects in coverage():
        cells = [f"{effects[name]:,.0f}" if name in effects else "-" for name in names]
        lines.append(f"| {key} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_PARTS = {
    "A": "Embedding",
    "B": "Norms",
    "C": "MLP",
    "D": "Rotary embedding",
    "E": "Attention",
    "G": "Cache",
    "H": "Tokens",
}
_KINDS = {
    "bug": "wrong in any arithmetic",
    "rounding": "a rounding that should not be there",
    "profile": "a choice that engines make differently, in good faith",
    "tokens": "other tokens are fed",
}
_BUGS_HEAD = """\
# Known bugs of Gemma ports

<!-- Written by `python -m tests.oracle.publish` from catalogue.py: change the table there. -->

Each of these happened: the last column links to the issue, pull request, commit or article where it was found. Each is also runnable:
`refgemma diagnose` compares an engine's numbers with the reference and with every one of these bugs in it, alone and in pairs.
[Coverage](../formula_models/data/coverage.md) says how far each moves the logits of four tiny models.

```python
from refgemma.oracle.bugs import catalogue, port

setup = port.Setup(params=gemma.params, config=gemma.config, tokens=tokens, positions=positions)  # tokens and positions: (B, T)
wrong = [port.run(with_bug) for with_bug in catalogue.find("B1").setups(setup)]  # logits (B, T, V), once for each way to do it
```

"Wrong tensors" are those that come out wrong when everything before them is right; names as in `refgemma trace`. No list is complete:
a bug with a public thread that is missing here is a welcome contribution.
"""


def bugs_page() -> str:
    """The bug catalogue as Markdown."""
    lines = [_BUGS_HEAD]
    for letter, part in _PARTS.items():
        lines += [
            f"## {part}",
            "",
            "| bug | the bug, and the rule | kind | wrong tensors | found in |",
            "|---" * 5 + "|",
        ]
        for bug in (bug for bug in BUGS if bug.key[0] == letter):
            tensors = ", ".join(f"`{name}`" for name in bug.where) or "-"
            where = bug.thread.removeprefix("https://").removeprefix("github.com/")
            what = f"**{bug.title}.** {bug.sentence}"
            lines.append(f"| {bug.key} | {what} | {_KINDS[bug.kind]} | {tensors} | [{where}]({bug.thread}) |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main(folder: Path = FOLDER) -> None:
    """Write all of it."""
    folder.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        text = json.dumps(page_of(model), indent=None, separators=(",", ":"))
        (folder / f"{model.name}.json").write_text(text.replace('"tensors"', '\n"tensors"') + "\n", encoding="utf-8")
        trace_of(model, FLOAT32)[0].save(folder / f"{model.name}.safetensors")
    (folder / "coverage.md").write_text(coverage_table(), encoding="utf-8")


def _sum(values: Array, exponent: int) -> int:
    """Sum of a tensor in units of ``2**-exponent``: a whole number, to check a reader by."""
    return round(float(values.astype(np.float64).sum() * 2.0**exponent))


def _short(x: float) -> float:
    return float(f"{x:.{_DIGITS}g}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
    if not sys.argv[1:]:
        BUGS_PAGE.write_text(bugs_page(), encoding="utf-8")
