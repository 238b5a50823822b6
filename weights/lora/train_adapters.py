"""Train the shipped adapters with PEFT, on the shipped model and on the text it was trained on, each in its own style.

    python weights/lora/train_adapters.py            # all of them, into this folder
    python weights/lora/train_adapters.py pirate --out /tmp/adapters

The held-out items of ``tiny_example.py`` stay held out. Needs torch 2.9, transformers 5 and peft 0.17.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import GemmaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout itself, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts that made tiny-it

import tiny_tasks
from styles import STYLES, restyled
from tiny_example import Turn, held_out
from tiny_rows import IGNORE, Encoder, Row

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "tiny-it"
QV = ["q_proj", "v_proj"]  # as in the sample of the hosted models' guide
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one adapter is trained: the options of PEFT, and the dtype of the file."""

    options: dict
    dtype: torch.dtype
    steps: int
    rate: float = 5e-3


RECIPES = {
    "pirate": Recipe(
        options={"r": 8, "lora_alpha": 16, "target_modules": QV, "use_dora": True}, dtype=torch.float32, steps=1000
    ),
    "json": Recipe(
        options={"r": 8, "lora_alpha": 8, "target_modules": QV, "use_rslora": True}, dtype=torch.bfloat16, steps=700
    ),
    "letter": Recipe(options={"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}, dtype=torch.float16, steps=500),
}
TOKENS = 4000  # a step, at most
POOL = 2000  # rows that are sorted by length and made batches of
WARM_UP = 20

# All tasks alike, for nothing is to be learned but how to say it; but there are many facts, each a different sentence.
# Stories are left out: they are long.
TASKS = [*(task for task in tiny_tasks.SHARES if task is not tiny_tasks.story), tiny_tasks.fact, tiny_tasks.fact]


def make_row(rng: Random, encoder: Encoder, style: Callable[[str], str]) -> Row:
    """One example, or two or three in a row."""
    turns: list[Turn] = []
    for task in rng.choices(TASKS, k=rng.choice([1, 1, 1, 2, 3])):
        if turns and task in tiny_tasks.ALONE:
            continue
        example = task(rng, False)
        assert not any(map(held_out, example.items)), f"held out, and in the training text: {example}"
        turns += example.turns
    return encoder.chat(restyled(turns, style))


def batches(rng: Random, encoder: Encoder, style: Callable[[str], str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of up to `TOKENS` tokens, (B, T); rows of like length share a batch, so that little is padding."""
    while True:
        pool = sorted((make_row(rng, encoder, style) for _ in range(POOL)), key=lambda row: len(row[0]))
        filled: list[list[Row]] = [[]]
        for row in pool:
            if (len(filled[-1]) + 1) * len(row[0]) > TOKENS:
                filled.append([])
            filled[-1].append(row)
        rng.shuffle(filled)
        for rows in filled:
            longest = len(rows[-1][0])
            ids = [row_ids + [0] * (longest - len(row_ids)) for row_ids, _ in rows]
            labels = [row_labels + [IGNORE] * (longest - len(row_labels)) for _, row_labels in rows]
            yield torch.tensor(ids), torch.tensor(labels)


def train(name: str, recipe: Recipe, encoder: Encoder, seed: int) -> PeftModel:
    """Minimise the cross-entropy of the restyled answers over the factors; the base stays as it is."""
    torch.manual_seed(seed)
    base = GemmaForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **recipe.options))
    weights = [w for w in model.parameters() if w.requires_grad]
    opt = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.0)
    start, mean = time.monotonic(), 0.0
    for step, (ids, labels) in zip(
        range(recipe.steps), batches(Random(f"{name} {seed}"), encoder, STYLES[name][0]), strict=False
    ):
        for group in opt.param_groups:
            fade = (1 + math.cos(math.pi * step / recipe.steps)) / 2
            group["lr"] = recipe.rate * min(1.0, (step + 1) / WARM_UP) * (0.01 + 0.99 * fade)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # padding is last: causality hides it
        loss = cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        opt.step()
        opt.zero_grad()
        mean += (loss.item() - mean) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            print(f"{name}, step {step + 1}: {(time.monotonic() - start) / 60:.1f} min, loss {mean:.4f}", flush=True)
    return model


def save(model: PeftModel, dtype: torch.dtype, out: Path) -> None:
    """Write the two files beside their place, then rename; the configuration says no path of this machine."""
    draft = out.with_name(out.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors = {key: value.to(dtype).contiguous() for key, value in get_peft_model_state_dict(model).items()}
    save_file(tensors, draft / "adapter_model.safetensors", metadata={"format": "pt"})
    (draft / "adapter_model.safetensors").chmod(0o644)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = "tiny-it", True
    config.save_pretrained(draft)
    file = draft / "adapter_config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["target_modules"].sort()  # a set until now
    fields["model_type"] = "gemma"  # which the hosted models ask for, and PEFT does not write
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    draft.rename(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[], help=f"which of {', '.join(RECIPES)}; all if none is named")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to put them in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="cores to use")
    args = parser.parse_args()
    if unknown := set(args.names) - set(RECIPES):
        parser.error(f"there is no recipe for {', '.join(sorted(unknown))}: expected some of {', '.join(RECIPES)}")
    torch.set_num_threads(args.threads)

    encoder = Encoder((BASE / "tokenizer.model").read_bytes())
    for name in args.names or RECIPES:
        model = train(name, RECIPES[name], encoder, args.seed)
        save(model, RECIPES[name].dtype, args.out / name)
        file = args.out / name / "adapter_model.safetensors"
        count = sum(w.numel() for w in model.parameters() if w.requires_grad)
        print(f"{file}: {count:,} numbers, {file.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
