"""What PEFT computes with the shipped adapters: tests/goldens/lora.json, by tests/peers/make_lora_golden.py."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.judge import UNIT
from tests.tiny_it import sha256

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = ROOT / "weights" / "lora"
GOLDEN = ROOT / "tests" / "goldens" / "lora.json"
HASHED = ("adapter_config.json", "adapter_model.safetensors")
POSITIONS = 4
REMAKE = "remake the record, with torch, transformers and peft: python -m tests.peers.make_lora_golden"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One adapter, one prompt, and what PEFT computes."""

    adapter: str
    name: str
    prompt: str
    tokens: list[int]
    answer: list[int]
    margin: float
    float32_error: dict[str, float]  # attached, merged; in units of 2**-24
    logits: np.ndarray = field(repr=False)  # float64, (POSITIONS, V), at the last positions

    def float32_bound(self, how):
        """Largest error of float32, attached or merged: twice that of PEFT, and four roundings; as in `tests.judge`."""
        return (2 * self.float32_error[how] + 4) * UNIT


def hashes(names):
    """Of the files that a record is about."""
    files = {f"lora/{name}/{file}": ADAPTERS / name / file for name in names for file in HASHED}
    files["tiny-it/model.safetensors"] = ROOT / "weights" / "tiny-it" / "model.safetensors"
    return {name: sha256(path) for name, path in files.items()}


@functools.cache
def certificate():
    """Everything but the logits."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@functools.cache
def records():
    """All of them, by adapter and name of the prompt."""
    with np.load(GOLDEN.with_suffix(".npz")) as arrays:
        logits = np.split(arrays["logits"], len(certificate()["records"]))
    entries = zip(certificate()["records"], logits, strict=True)
    return {(entry["adapter"], entry["name"]): Record(**entry, logits=rows) for entry, rows in entries}
