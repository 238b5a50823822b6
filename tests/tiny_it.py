"""Recorded logits of the shipped model, and how far from them a computation may be.

The record is tests/goldens/tiny_it.json and .npz, made with transformers by tests/peers/make_tiny_it_golden.py: twelve
prompts, in float64 (the truth), float32 and bfloat16, at every 16th position and the last four. Errors are relative to
the largest true logit of a prompt.
"""

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import refgemma
from refgemma.checkpoint.folder import find_model
from refgemma.model import forward
from refgemma.numerics import ROUNDING_POINTS, Array, Numerics, from_bfloat16
from tests.judge import FLOAT64_BOUND, UNIT, error

GOLDEN = Path(__file__).parent / "goldens" / "tiny_it.json"
REMAKE = "remake the goldens, with torch and transformers installed: python -m tests.peers.make_tiny_it_golden"
HASHED = ("model.safetensors", "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One prompt and what transformers computes for it."""

    name: str
    prompt: str | list
    raw: bool
    tokens: list[int]
    positions: list[int]  # at which logits are kept
    logits: dict[str, np.ndarray] = field(repr=False)  # dtype name: (positions, V); bfloat16 as float32

    @property
    def truth(self):
        """Logits in float64."""
        return self.logits["float64"]

    @property
    def float32_bound(self):
        """Largest error of float32: twice that of transformers, and four roundings; the rule of `tests.judge`."""
        return 2 * error(self.logits["float32"], self.truth) + 4 * UNIT

    def bound(self, dtype):
        """Largest error of a computation in `dtype`."""
        if dtype == "bfloat16":
            return bfloat16_bounds()[self.name]
        return FLOAT64_BOUND if dtype == "float64" else self.float32_bound


@functools.cache
def certificate():
    """Everything about the goldens but the logits."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@functools.cache
def recorded():
    """The prompts, by name; fails where the record is about other weights."""
    if changed := changed_files(find_model("tiny-it")):
        pytest.fail(f"{', '.join(changed)} of tiny-it changed since its logits were recorded: {REMAKE}")
    with np.load(GOLDEN.with_suffix(".npz")) as arrays:
        logits = dict(arrays)  # rows of all prompts, one after the other
    logits["bfloat16"] = from_bfloat16(logits["bfloat16"])
    prompts, row = {}, 0
    for entry in certificate()["prompts"]:
        rows = slice(row, row + len(entry["positions"]))
        prompts[entry["name"]] = Recorded(**entry, logits={dtype: array[rows] for dtype, array in logits.items()})
        row = rows.stop
    return prompts


def changed_files(folder):
    """Files of a model folder that are not those the logits were recorded with."""
    return [name for name, digest in certificate()["weights_sha256"].items() if sha256(folder / name) != digest]


def sha256(path):
    """Hash of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@functools.cache
def tiny_it(numerics="float32", weights=None, xp=np):
    """The shipped model, loaded as users load it, in the arrays of a library."""
    return refgemma.load("tiny-it", numerics=numerics, weights=weights, device="cpu" if xp is np else "cuda")


# ---- bfloat16: processors sum differently, roundings flip and grow, so that no two need agree in a single logit

NOISY_RUNS = 3

# transformers in bfloat16 computes its norms and the angles of its rope in float32, and narrows what comes out.
KEPT_IN_FLOAT32 = {"norm.gain", "norm.normed", "rope.frequency", "rope.angle"}
ROUNDED = frozenset(ROUNDING_POINTS) - KEPT_IN_FLOAT32


@dataclass(frozen=True, kw_only=True)
class NoisyNumerics(Numerics):
    """Float64 with an error as large as that of bfloat16 wherever an engine would round, drawn at random.

    A number in bfloat16 has 8 significant bits, so rounding changes it by at most 2**-8 of itself.
    """

    rng: np.random.Generator

    def round(self, point: str, value: Array) -> Array:
        if point not in ROUNDED:
            return value
        return value * (1 + 2.0**-8 * self.rng.uniform(-1, 1, size=np.shape(value)))


@functools.cache
def bfloat16_bounds():
    """Largest error of bfloat16 for each prompt: twice the largest of a few runs with rounding errors drawn at random.

    Twice, for an engine is one more draw, and its errors are not as independent as ours: one in the rope table, say,
    returns in every layer. Measured: transformers is at 0.2 to 0.8 of the largest of three runs. Its roundings are at
    most half a spacing, and on average half of the largest possible, which all of ours may reach.
    """
    gemma = tiny_it("float64")
    bounds = {}
    for name, prompt in recorded().items():
        errors = []
        for seed in range(NOISY_RUNS):
            noisy = NoisyNumerics("noisy", np.dtype(np.float64), rng=np.random.default_rng(seed))
            logits = forward(gemma.params, gemma.config, np.array([prompt.tokens]), numerics=noisy)[0]
            errors.append(error(logits[prompt.positions], prompt.truth))
        bounds[name] = 2 * max(errors)
    return bounds
