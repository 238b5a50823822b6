"""Train the shipped model, from nothing, on text that this folder generates.

    python weights/train_tiny_it.py --out weights/tiny-it

A Gemma 1 in all but size: transformers' own ``GemmaForCausalLM``, a SentencePiece tokenizer with Gemma's conventions,
the chat format as plain text. What it is taught stands in ``tiny_tasks.py``. Needs torch 2.9 and transformers 5.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import GemmaConfig, GemmaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout itself, installed or not

import tiny_tasks
from tiny_rows import END_OF_TURN, IGNORE, TOKENS, VOCABULARY, Encoder, batches, train_tokenizer

SHAPE = {
    # Chosen to expose mistakes: sqrt(D) is not exact in bfloat16, N * H is not D, 1 < K < N, F is not 4 * D.
    "vocab_size": VOCABULARY,
    "hidden_size": 184,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
PEAK_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 100, 0.05


def new_model(seed: int) -> GemmaForCausalLM:
    """Random weights; the norms start at 0, which is a gain of 1."""
    torch.manual_seed(seed)
    config = GemmaConfig(**SHAPE)
    config._attn_implementation = "eager"  # at these lengths the fused kernel is half as fast on a CPU
    model = GemmaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.zeros_(weight)
        else:
            into_residual = "o_proj" in name or "down_proj" in name
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5 * (0.5 if into_residual else 1.0))
    return model


def optimizers(model: GemmaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding table and the norms."""
    inside = [w for name, w in model.named_parameters() if w.ndim == 2 and "embed" not in name]
    others = [w for name, w in model.named_parameters() if w.ndim == 1 or "embed" in name]
    return [
        torch.optim.Muon(inside, momentum=0.95, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, progress: float) -> float:
    """A linear warm-up, then a cosine from the peak to a hundredth of it."""
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def train(
    model: GemmaForCausalLM,
    encoder: Encoder,
    *,
    steps: int,
    minutes: float | None,
    seed: int,
    each_step: Callable[[int, GemmaForCausalLM], None],
) -> GemmaForCausalLM:
    """Minimise the cross-entropy of the labelled tokens; return the running average of the weights.

    The learning rate follows the steps done, or the minutes gone where `minutes` is given.
    """
    model.train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    opts = optimizers(model)
    device = next(model.parameters()).device
    start, losses = time.monotonic(), []
    for step, (ids, labels) in enumerate(batches(Random(f"rows {seed}"), encoder)):
        elapsed = (time.monotonic() - start) / 60
        progress = elapsed / minutes if minutes else step / steps
        if progress >= 1:
            break
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(
                input_ids=ids[:, :-1].to(device), use_cache=False
            ).logits  # padding is last: causality hides it
        loss = cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten().to(device), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = learning_rate(step, progress)
            opt.step()
            opt.zero_grad()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight, max(0.003, 10 / (11 + step)))
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seen = (step + 1) * TOKENS / 1e6
            print(
                f"step {step + 1}: {elapsed:.1f} min, {seen:.1f} M tokens, loss {np.mean(losses[-100:]):.4f}",
                flush=True,
            )
        each_step(step + 1, average)
    return average


@torch.no_grad()
def greedy(model: GemmaForCausalLM, encoder: Encoder, prompts: list[list[int]], max_tokens: int = 64) -> list[str]:
    """Answers at temperature 0; prompts of equal length go together, so that none is padded."""
    texts = [""] * len(prompts)
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in rows], device=next(model.parameters()).device)
        cache, answers = None, torch.empty((len(rows), 0), dtype=torch.long, device=ids.device)
        while answers.shape[1] < max_tokens and not (answers == END_OF_TURN).any(dim=1).all():
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            answers = torch.cat([answers, ids], dim=1)
        for i, answer in zip(rows, answers.tolist(), strict=True):
            stop = answer.index(END_OF_TURN) if END_OF_TURN in answer else len(answer)
            texts[i] = encoder.tokenizer.decode(answer[:stop]).strip()
    return texts


def test(model: GemmaForCausalLM, encoder: Encoder, count: int) -> dict[str, tuple[int, int]]:
    """For each task, held-out examples of which every asked turn came out right, and examples tried."""
    table = {}
    for task in tiny_tasks.TESTS:
        examples = tiny_tasks.test_set(task, count)
        cases = [(k, i % len(e.turns)) for k, e in enumerate(examples) for i in e.asked]
        prompts = [
            encoder.chat(list(examples[k].turns[:i]))[0] + encoder.question(examples[k].turns[i][0]) for k, i in cases
        ]
        texts = greedy(model, encoder, prompts)
        wrong = {k for (k, i), text in zip(cases, texts, strict=True) if text != examples[k].turns[i][1]}
        table[task] = (len(examples) - len(wrong), len(examples))
    return table


def save(model: GemmaForCausalLM, tokenizer_model: bytes, out: Path) -> None:
    """Write the folder beside its place, in bfloat16, then rename it."""
    draft = out.with_name(out.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors = {name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in model.named_parameters()}
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    (draft / "model.safetensors").chmod(0o644)
    (draft / "tokenizer.model").write_bytes(tokenizer_model)
    config = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "dtype": "bfloat16", "rope_theta": 10_000.0}
    generation = {"bos_token_id": 2, "eos_token_id": [1, END_OF_TURN], "pad_token_id": 0}
    for name, fields in (("config.json", {**config, **SHAPE}), ("generation_config.json", generation)):
        (draft / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    draft.rename(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--minutes", type=float, help="train for so long, in place of --steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="cores to use")
    parser.add_argument("--test-every", type=int, default=1000, help="steps between short tests; 0 for none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer_model = train_tokenizer(args.seed)
    encoder = Encoder(tokenizer_model)
    model = new_model(args.seed).to(args.device)
    print(f"{sum(w.numel() for w in model.parameters()):,} parameters", flush=True)

    def each_step(step: int, average: GemmaForCausalLM) -> None:
        if args.test_every and step % args.test_every == 0:
            save(average, tokenizer_model, args.out.with_name(args.out.name + "-so-far"))
            shares = {task: right / count for task, (right, count) in test(average, encoder, 40).items()}
            print(", ".join(f"{task} {share:.0%}" for task, share in shares.items()), flush=True)

    model = train(model, encoder, steps=args.steps, minutes=args.minutes, seed=args.seed, each_step=each_step)
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())  # what is tested is what is shipped
    save(model, tokenizer_model, args.out)
    for task, (right, count) in test(model, encoder, 200).items():
        print(f"{task:12} {right:4} of {count}  {right / count:.1%}")


if __name__ == "__main__":
    main()
