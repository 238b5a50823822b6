"""Write tests/goldens/lora.json and lora.npz: what PEFT computes for a few prompts with each shipped adapter.

Run ``python -m tests.peers.make_lora_golden`` where torch, transformers and peft are installed, whenever weights/lora
or weights/tiny-it changes.
"""

import json

import numpy as np

from tests.judge import UNIT, error
from tests.lora.shipped_record import ADAPTERS, GOLDEN, HASHED, POSITIONS, hashes
from tests.peers.make_tiny_it_golden import CHAT, load_peer, processor, with_tokens
from tests.tiny_it import sha256

PROMPTS = [  # name, raw, prompt
    ("sum", CHAT, "What is 17 + 25?"),
    ("story", CHAT, "Tell me a story about a fox."),
    ("french", CHAT, "Comment dit-on « window » en français ?"),
]
MAX_TOKENS = 24


def main():
    """Compute and write both files."""
    import peft
    import torch
    import transformers

    from tests.peers.peft_side import quiet

    names = sorted(path.parent.name for path in ADAPTERS.glob("*/adapter_config.json"))
    if not names:
        raise FileNotFoundError(f"no adapter in {ADAPTERS}: expected folders that hold adapter_config.json")
    entries, logits = [], []
    for name in names:
        with quiet():
            wide, narrow, merged = (
                peft.PeftModel.from_pretrained(load_peer(dtype), ADAPTERS / name)
                for dtype in ("float64", "float32", "float32")
            )
            merged = merged.merge_and_unload()
        for prompt in (with_tokens(*prompt) for prompt in PROMPTS):
            entry, rows = record(name, prompt, wide, narrow, merged)
            entries.append(entry)
            logits.append(rows)
    arrays = GOLDEN.with_suffix(".npz")
    part = arrays.with_suffix(".part.npz")
    np.savez_compressed(part, logits=np.concatenate(logits))
    part.replace(arrays)
    certificate = {
        "what": f"logits in float64 of weights/tiny-it with each adapter of weights/lora, at the last {POSITIONS} "
        "positions of each prompt; all in one array, (rows, V)",
        "file": arrays.name,
        "sha256": sha256(arrays),
        "made_by": "tests/peers/make_lora_golden.py",
        "code": "PeftModel.from_pretrained on GemmaForCausalLM.from_pretrained, eager attention, a prompt at a time, "
        "no cache; in float64 with what transformers leaves in float32 widened (tests/peers/eager.py)",
        "float32_error": "of PEFT's logits in float32, attached and merged, in units of 2**-24 of the largest logit",
        "answer": f"tokens that PEFT's model in float32 answers greedily, {MAX_TOKENS} at most; margin: least distance "
        "of the two largest logits on the way, over the largest logit",
        "library_versions": {
            "peft": peft.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": "CPU",
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "files_sha256": hashes(names),
    }
    head = json.dumps(certificate, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in entries)
    part = GOLDEN.with_suffix(".part")
    part.write_text(f'{head},\n "records": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    part.replace(GOLDEN)
    print(f"{len(names)} adapters, {len(entries)} records, {len(HASHED)} files of each")


def record(name, prompt, wide, narrow, merged):
    """Entry of an adapter and a prompt, and its logits."""
    import torch

    from tests.peers.make_tiny_it_golden import peer_logits

    truth, attached, whole = (peer_logits(peer, prompt["tokens"]) for peer in (wide, narrow, merged))
    ids = torch.tensor([prompt["tokens"]])
    out = narrow.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS
    )[0].tolist()
    answer = out[len(prompt["tokens"]) :]
    on_the_way = peer_logits(wide, out)[len(prompt["tokens"]) - 1 : -1]
    best = np.sort(on_the_way, axis=-1)[:, -2:]
    entry = {
        "adapter": name,
        "name": prompt["name"],
        "prompt": prompt["prompt"],
        "tokens": prompt["tokens"],
        "answer": answer,
        "margin": float((best[:, 1] - best[:, 0]).min() / np.abs(on_the_way).max()),
        "float32_error": {
            "attached": round(error(attached, truth) / UNIT, 2),
            "merged": round(error(whole, truth) / UNIT, 2),
        },
    }
    return entry, truth[-POSITIONS:]


if __name__ == "__main__":
    main()
