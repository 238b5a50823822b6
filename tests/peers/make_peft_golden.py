"""Write tests/goldens/peft_cases.json and peft_cases.npz: what PEFT computes for some small adapters.

Run ``python -m tests.peers.make_peft_golden`` where torch, transformers and peft are installed, whenever
`tests.lora.peft_folders` draws other models or values. Of an adapter its settings, and the names and shapes of its
tensors, are kept as PEFT writes them; readers of the record draw the values again.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from tests.judge import UNIT, error
from tests.lora.peft_folders import digest, draw_tensors, model_to_adapt, write_adapter
from tests.lora.peft_record import GOLDEN, POSITIONS
from tests.models import digest as digest_of_model
from tests.tiny_it import sha256

BASE = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6}
CASES = {  # name: model, dtype of the file, what differs from BASE
    "all linear, rsLoRA, patterns": (
        {},
        "float32",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"mlp.down_proj": 2, r"layers\.0\.self_attn\.q_proj": 6},
            "alpha_pattern": {"k_proj": 20},
        },
    ),
    "expression, exclusion, fan_in_fan_out": (
        {"tied": False},
        "float16",
        {"target_modules": r".*self_attn\.\w+", "exclude_modules": ["o_proj"], "fan_in_fan_out": True, "bias": "all"},
    ),
    "embedding alone, tied": ({}, "float64", {"target_modules": ["embed_tokens", "v_proj"]}),
    "head alone, tied": ({}, "float32", {"target_modules": ["lm_head"], "use_rslora": True}),
    "embedding and head together": (
        {},
        "bfloat16",
        {"target_modules": ["embed_tokens", "up_proj"], "ensure_weight_tying": True},
    ),
    "embedding and head, untied": ({"tied": False}, "float64", {"target_modules": ["embed_tokens", "lm_head"]}),
    "DoRA": ({}, "float64", {"target_modules": ["q_proj", "o_proj", "gate_proj", "embed_tokens"], "use_dora": True}),
    "bias of the second factor": ({}, "float32", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    "norms and head trained whole": (
        {},
        "float32",
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    ),
    "a block and the embedding trained whole": (
        {"tied": False},
        "float16",
        {"target_modules": ["k_proj"], "modules_to_save": ["layers.0.mlp", "embed_tokens"]},
    ),
    "rows of the table, tied": ({}, "float32", {"target_modules": ["v_proj"], "trainable_token_indices": True}),
    "one list of rows for table and head": (
        {},
        "float64",
        {"target_modules": ["o_proj"], "trainable_token_indices": ["embed_tokens", "lm_head"]},
    ),
    "rows of the table under factors of the head, tied": (
        {},
        "float32",
        {"target_modules": ["lm_head"], "trainable_token_indices": True},
    ),
    "embedding and head together, each with its scale": (
        {},
        "float32",
        {"target_modules": ["lm_head"], "ensure_weight_tying": True, "rank_pattern": {"embed_tokens": 2}},
    ),
    "one layer, and the head by its full name": (
        {"tied": False},
        "bfloat16",
        {"target_modules": ["gate_proj", "lm_head"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "square factors of square weights": (
        {"square": True},
        "float64",
        {"target_modules": ["q_proj", "o_proj"], "r": 32},
    ),
}


def main():
    """Compute and write both files."""
    import peft
    import torch
    import transformers

    entries, logits = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(CASES):
            entry, rows = record(seed, name, Path(folder) / str(seed))
            entries.append(entry)
            logits.append(rows.ravel())
    arrays = GOLDEN.with_suffix(".npz")
    part = arrays.with_suffix(".part.npz")
    np.savez_compressed(part, logits=np.concatenate(logits))
    part.replace(arrays)
    certificate = {
        "what": f"logits in float64 of small random models with an adapter, of the first row at its last {POSITIONS} "
        "positions; all cases one after the other",
        "file": arrays.name,
        "sha256": sha256(arrays),
        "made_by": "tests/peers/make_peft_golden.py",
        "code": "PeftModel.from_pretrained on GemmaForCausalLM, eager attention; its narrow spots widened to float64 "
        "(tests/peers/eager.py)",
        "library_versions": {
            "peft": peft.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": "CPU",
        "float32_error": "of PEFT's logits at all positions, in units of 2**-24 of the largest logit",
    }
    head = json.dumps(certificate, indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    part = GOLDEN.with_suffix(".part")
    part.write_text(f'{head},\n "cases": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    part.replace(GOLDEN)


def record(seed, name, folder):
    """Entry of a case, and its logits."""
    from tests.peers import peft_side

    of_model, dtype, options = CASES[name]
    of_model = {"tied": True, "square": False, "weights": dtype} | of_model
    model = model_to_adapt(seed, **of_model, num_layers=2)
    options = BASE | options
    if tables := options.get("trainable_token_indices"):
        rows = sorted({int(i) for i in model.tokens[0, -3:]} | {3})
        options["trainable_token_indices"] = rows if tables is True else dict.fromkeys(tables, rows)
    settings, shapes = peft_side.what_peft_writes(model, options, folder)
    settings = {field: value for field, value in settings.items() if value not in (None, False, {}, [])}
    tensors = draw_tensors(seed, shapes, settings, model)
    write_adapter(folder, settings, tensors, dtype)
    peer = peft_side.load(model, folder)
    if not peft_side.holds(peer, folder):
        raise ValueError(f"{name}: PEFT did not take every tensor")
    wide, narrow = peft_side.logits(peer, model), peft_side.logits(peft_side.load(model, folder, float64=False), model)
    entry = {
        "name": name,
        "seed": seed,
        "model": of_model,
        "dtype": dtype,
        "settings": settings,
        "shapes": shapes,
        "digests": [digest_of_model(model), digest(tensors)],
        "float32_error": round(error(narrow[model.real], wide[model.real]) / UNIT, 2),
    }
    return entry, wide[0, -POSITIONS:]


if __name__ == "__main__":
    main()
