"""Write tests/goldens/tiny_it.json and tiny_it.npz: what transformers computes for twelve prompts to the shipped model.

Run ``python -m tests.peers.make_tiny_it_golden`` where torch and transformers are installed, whenever weights/tiny-it
changes.
"""

import json
import platform
from pathlib import Path

import numpy as np
import sentencepiece

from refgemma.numerics import from_bfloat16, to_bfloat16
from tests.tiny_it import GOLDEN, HASHED, sha256

FOLDER = Path(__file__).parents[2] / "weights" / "tiny-it"
DTYPES = ("float64", "float32", "bfloat16")
LONG = 500  # tokens

NAMES = ["Mia", "Tom", "Anna", "Omar", "Lena"]
THINGS = ["apple", "lamp", "door", "river", "cloud", "song", "boat"]
LONG_TEXT = " ".join(f"{NAMES[n % 5]} has {n} {THINGS[n % 7]}s and {n * n} more." for n in range(1, 90))

RAW, CHAT = True, False
PROMPTS = [  # name, raw, prompt
    ("nothing", RAW, ""),
    ("opening", RAW, "Once upon a time there was a"),
    ("code", RAW, "def f(x):\n    return x + 1\n\n\n"),
    ("bytes", RAW, "日本語 \N{DOG FACE} naïve Ω"),
    ("markers", RAW, "<start_of_turn>user\nHello!<end_of_turn>\n<start_of_turn>model\nHello"),
    ("long", RAW, LONG_TEXT),
    ("sum", CHAT, "What is 17 + 25?"),
    ("spelling", CHAT, "Spell banana backwards."),
    ("story", CHAT, "Tell me a story about a fox."),
    ("french", CHAT, "Comment dit-on « window » en français ?"),
    ("german", CHAT, "Grüß Gott! Wie geht’s dir heute?"),
    (
        "memory",
        CHAT,
        [
            {"role": "user", "content": "My name is Anna."},
            {"role": "assistant", "content": "Nice to meet you, Anna!"},
            {"role": "user", "content": "What is my name?"},
        ],
    ),
]


def main():
    """Compute and write both files."""
    import torch
    import transformers

    prompts = [with_tokens(*prompt) for prompt in PROMPTS]
    logits = {}
    for dtype in DTYPES:
        peer = load_peer(dtype)
        rows = [peer_logits(peer, prompt["tokens"])[prompt["positions"]] for prompt in prompts]
        logits[dtype] = np.concatenate(rows)
    if not np.array_equal(from_bfloat16(to_bfloat16(logits["bfloat16"])), logits["bfloat16"]):
        raise ValueError("logits in bfloat16 are no bfloat16 numbers: expected a model that computes in it throughout")
    logits["bfloat16"] = to_bfloat16(logits["bfloat16"])
    arrays = GOLDEN.with_suffix(".npz")
    part = arrays.with_suffix(".part.npz")
    np.savez_compressed(part, **logits)
    part.replace(arrays)

    certificate = {
        "what": "logits of weights/tiny-it for each prompt at its positions; all rows in one array a dtype, (rows, V)",
        "file": arrays.name,
        "sha256": sha256(arrays),
        "made_by": "tests/peers/make_tiny_it_golden.py",
        "code": "transformers, GemmaForCausalLM.from_pretrained, eager attention, a prompt at a time, no cache",
        "dtypes": {
            "float64": "with what transformers leaves in float32 widened (tests/peers/eager.py)",
            "float32": "as it is",
            "bfloat16": "as it is; stored as bits, uint16",
        },
        "library_versions": {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": "CPU",
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "weights_sha256": {name: sha256(FOLDER / name) for name in HASHED},
    }
    head = json.dumps(certificate, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(prompt, ensure_ascii=False) for prompt in prompts)
    part = GOLDEN.with_suffix(".part")
    part.write_text(f'{head},\n "prompts": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    part.replace(GOLDEN)


def with_tokens(name, raw, prompt):
    """A prompt, its token ids, and the positions at which logits are kept.

    The ids are what SentencePiece alone makes of the conversation written out by hand, ``<bos>`` before it: no code of
    `refgemma` has a part in them.
    """
    spm = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
    if name == "long":  # <bos> and 499 more
        ends = (n for n in range(len(prompt)) if len(spm.encode(prompt[:n])) == LONG - 1)
        prompt = prompt[: next(ends)]
    text = prompt
    if not raw:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        roles = {"user": "user", "assistant": "model"}
        turns = [f"<start_of_turn>{roles[m['role']]}\n{m['content']}<end_of_turn>\n" for m in messages]
        text = "".join(turns) + "<start_of_turn>model\n"
    tokens = [spm.bos_id(), *spm.encode(text)]
    T = len(tokens)
    positions = sorted({*range(15, T, 16), *range(max(T - 4, 0), T)})
    return {"name": name, "raw": raw, "prompt": prompt, "tokens": tokens, "positions": positions}


def load_peer(dtype):
    """transformers' model of the shipped weights, read from their files by transformers itself."""
    import torch
    from transformers import GemmaForCausalLM

    from tests.peers.eager import widen

    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    peer = GemmaForCausalLM.from_pretrained(FOLDER, dtype=stored, attn_implementation="eager").eval()
    return widen(peer.double()) if dtype == "float64" else peer


def peer_logits(peer, tokens):
    """Logits (T, V); those in bfloat16 as float32, which holds them exactly."""
    import torch

    with torch.no_grad():
        logits = peer(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return (logits.float() if logits.dtype == torch.bfloat16 else logits).numpy()


def processor():
    """Name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
