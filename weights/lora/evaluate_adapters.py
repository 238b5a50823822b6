"""Ask tiny-it every held-out question with each shipped adapter, with refgemma alone, and print the table of
``weights/README.md``.

python weights/lora/evaluate_adapters.py                    # attached
python weights/lora/evaluate_adapters.py --merged --show 2  # merged; and two wrong answers of each task
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout itself, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts that made tiny-it

import tiny_tasks
from evaluate_tiny_it import answers, conversation
from styles import STYLES, is_call, restyled

import refgemma

HERE = Path(__file__).resolve().parent
WANTED = (
    0.95  # share of all answers that are to be in the style; and right as often as tiny-it alone, within this share
)


def count(gemma: refgemma.Gemma, name: str | None, task: str, most: int, show: int) -> tuple[int, int, int]:
    """Held-out examples of a task; of how many every asked answer is in the style; of how many it is right, too."""
    style, is_styled = STYLES[name] if name else (str, lambda text: True)
    examples = [restyled(example.turns, style) for example in tiny_tasks.test_set(task, most)]
    asked = [example.asked for example in tiny_tasks.test_set(task, most)]
    cases = [(k, i % len(examples[k])) for k, turns in enumerate(asked) for i in turns]
    texts = answers(gemma, [conversation(examples[k][:i], examples[k][i][0]) for k, i in cases])
    wanted = [examples[k][i][1] for k, i in cases]
    judged = list(zip(cases, wanted, texts, strict=True))
    plain = {k for (k, _), want, text in judged if not (is_call(text) if is_call(want) else is_styled(text))}
    wrong = {k for (k, _), want, text in judged if text != want}
    for _, want, text in [one for one in judged if one[1] != one[2]][:show]:
        print(f"    {want!r} expected, {text!r} given")
    return len(examples), len(examples) - len(plain), len(examples) - len(wrong)


def main() -> int:
    """Command line; exit code 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=None, help="adapters; all of them if none is named")
    parser.add_argument("--adapters", type=Path, default=HERE, help="folder that holds them")
    parser.add_argument("--model", default=str(HERE.parent / "tiny-it"))
    parser.add_argument("--count", type=int, default=200, help="held-out examples a task, where there are so many")
    parser.add_argument("--merged", action="store_true", help="merge the adapters instead of attaching them")
    parser.add_argument("--show", type=int, default=0, help="misses to print, a task")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    base = refgemma.load(args.model)
    names = args.names or [name for name in STYLES if (args.adapters / name).is_dir()]
    models = {None: base}
    for name in names:
        adapter = refgemma.lora.read(args.adapters / name)
        models[name] = base.merge_lora(adapter) if args.merged else base.with_lora(adapter)
    if not args.json:
        heads = [f"{name}: {what}" for name in names for what in ("in style", "right")]
        print(f"| {' | '.join(['task', 'held-out', 'tiny-it: right', *heads])} |")
        print(f"|{' --- |' * (3 + len(heads))}")
    table: dict[str, dict[str, dict[str, int]]] = {}
    for task in tiny_tasks.TESTS:
        row = table[task] = {}
        for name, gemma in models.items():
            examples, styled, right = count(gemma, name, task, args.count, args.show)
            row[name or "tiny-it"] = {"count": examples, "in style": styled, "right": right}
        if not args.json:
            shares = [row["tiny-it"]["right"], *(row[name][what] for name in names for what in ("in style", "right"))]
            print(f"| {task} | {examples} | {' | '.join(f'{share / examples:.1%}' for share in shares)} |", flush=True)
    if args.json:
        print(json.dumps(table, indent=2))

    def total(name: str, what: str) -> int:
        return sum(row[name][what] for row in table.values())

    good = all(
        total(name, "in style") >= WANTED * total(name, "count")
        and total(name, "right") >= WANTED * total("tiny-it", "right")
        for name in names
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
