"""Ask the shipped model every held-out question, with refgemma alone, and print the table of ``weights/README.md``.

python weights/evaluate_tiny_it.py                # exact match at temperature 0, then 200 stories at temperature 1
python weights/evaluate_tiny_it.py --json --model weights/tiny-it
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout itself, installed or not

import tiny_tasks
from tiny_example import Turn

import refgemma

WANTED = {"sums": 0.90, "differences": 0.90, "spelling": 0.90, "backwards": 0.90, "facts": 0.95, "recall": 0.95,
          "repeating": 0.95, "tools": 0.95}  # fmt: skip


def conversation(turns: tuple[Turn, ...], asked: str) -> list[dict[str, str]]:
    """Messages of a conversation that waits for an answer to `asked`."""
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": asked}]


def answers(gemma: refgemma.Gemma, conversations: list[list[dict[str, str]]], rows: int = 32) -> list[str]:
    """Greedy answers, conversations of like length side by side."""
    order = sorted(range(len(conversations)), key=lambda i: sum(len(m["content"]) for m in conversations[i]))
    texts = [""] * len(conversations)
    for start in range(0, len(order), rows):
        some = order[start : start + rows]
        outs = gemma.generate_batch([conversations[i] for i in some], temperature=0.0, max_tokens=64)
        for i, out in zip(some, outs, strict=True):
            texts[i] = out.text.strip()
    return texts


def exact_matches(gemma: refgemma.Gemma, task: str, count: int) -> tuple[int, int, list[tuple[str, str, str]]]:
    """How many held-out examples of `task` come out right in every asked turn, of how many, and the misses."""
    examples = tiny_tasks.test_set(task, count)
    cases = [(k, i % len(e.turns)) for k, e in enumerate(examples) for i in e.asked]
    texts = answers(gemma, [conversation(examples[k].turns[:i], examples[k].turns[i][0]) for k, i in cases])
    misses = [
        (k, examples[k].turns[i][0], examples[k].turns[i][1], text)
        for (k, i), text in zip(cases, texts, strict=True)
        if text != examples[k].turns[i][1]
    ]
    return len(examples) - len({k for k, *_ in misses}), len(examples), [tuple(rest) for _, *rest in misses]


def stories(gemma: refgemma.Gemma, count: int) -> tuple[int, int]:
    """How many of `count` stories at temperature 1 end by themselves, and how many different ones there are."""
    outs = [gemma.generate("Tell me a story.", temperature=1.0, max_tokens=400, seed=seed) for seed in range(count)]
    return sum(out.finish_reason == "stop" for out in outs), len({out.text for out in outs})


def main() -> int:
    """Command line; exit code 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent / "tiny-it"))
    parser.add_argument("--count", type=int, default=200, help="held-out examples a task, where there are so many")
    parser.add_argument("--stories", type=int, default=200, help="stories at temperature 1")
    parser.add_argument("--show", type=int, default=0, help="misses to print, a task")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    gemma = refgemma.load(args.model)
    table, good = {}, True
    if not args.json:
        print("| task | held-out | right | exact match | bar |\n| --- | --- | --- | --- | --- |", flush=True)
    for task in tiny_tasks.TESTS:
        right, count, misses = exact_matches(gemma, task, args.count)
        table[task] = {"right": right, "count": count}
        good &= right / count >= WANTED.get(task, 0.0)
        if not args.json:
            bar = f"{WANTED[task]:.0%}" if task in WANTED else "-"
            print(f"| {task} | {count} | {right} | {right / count:.1%} | {bar} |", flush=True)
            for asked, want, got in misses[: args.show]:
                print(f"    {asked[-80:]!r}: {want!r} expected, {got!r} given")
    ended, different = stories(gemma, args.stories)
    table["stories"] = {"ended": ended, "different": different, "count": args.stories}
    good &= ended == different == args.stories
    if args.json:
        print(json.dumps(table, indent=2))
    else:
        print(f"\nStories at temperature 1: {args.stories} generated,", end=" ")
        print(f"{ended} ended by themselves, {different} different.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
