"""The process that times transformers at its fastest: ``python -m refgemma.bench.peer FOLDER DTYPE``.

At its fastest: inference mode, torch's own number of threads (all cores), logits of the last position only, and both
of its attentions that run on every processor, of which the better one counts, measure by measure.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refgemma.bench import memory, plan
from refgemma.bench.counts import BYTES
from refgemma.config import Config, read_config

ATTENTIONS = ("sdpa", "eager")  # the thriftier first: memory is counted up to its end


def main(folder: Path, dtype: str) -> None:
    """Time one dtype."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = read_config(folder)
    engine_class = transformers.GemmaForCausalLM  # imported here, so that loading does not count it
    loaded = []

    def load() -> plan.Engine:
        model = engine_class.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=ATTENTIONS[0]
        ).eval()
        loaded.append(model)
        return plan.Engine(
            prefill=lambda tokens: model(torch.from_numpy(tokens), use_cache=True, logits_to_keep=1),
            decoder=lambda context, rows: _decoder(model, config, context, rows),
        )

    plan.say("about", threads=torch.get_num_threads())
    if dtype == "float32":
        plan.touch_memory(BYTES[dtype] * config.num_parameters)
    with torch.inference_mode(), memory.watched() as peaks:
        engine = plan.begin(load, config)
        for attention in ATTENTIONS:
            loaded[0].set_attn_implementation(attention)
            plan.carry_out(engine, config, peaks, attention)


def _decoder(model: Any, config: Config, context: int, rows: int) -> Callable[[], object]:
    torch = importlib.import_module("torch")
    cache = importlib.import_module("transformers").DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(2)
    shape = (rows, config.num_kv_heads, context, config.head_dim)
    for layer in range(config.num_layers):
        keys, values = (torch.randn(shape, generator=generator).to(model.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    tokens = torch.from_numpy(plan.prompt(config, 1)).repeat(rows, 1)

    # transformers 5.24 renamed the argument
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def step() -> None:
        nonlocal tokens
        out = model(tokens, use_cache=True, logits_to_keep=1, **{name: cache})
        tokens = out.logits[:, -1].argmax(-1, keepdim=True)

    return step


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
