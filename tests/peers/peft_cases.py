"""Random adapters and what PEFT computes with them; imports torch only when a case is drawn."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from refgemma import lora
from tests.judge import error
from tests.lora.peft_folders import draw_tensors, model_to_adapt, write_adapter
from tests.models import Model
from tests.peers.peft_options import random_options

CASES = 120
DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass
class Case:
    """An adapter in its folder, the model it is for, and what PEFT computes."""

    seed: int
    model: Model = field(repr=False)
    folder: Path
    dtype: str  # of the file
    options: dict
    settings: dict = field(repr=False)  # adapter_config.json
    tensors: dict = field(repr=False)
    attached: np.ndarray = field(repr=False)  # PEFT's logits in float64, at real positions
    attached_error: float  # of PEFT's logits in float32
    merged: np.ndarray | None = field(repr=False)  # None where a bias cannot be merged
    merged_error: float | None

    @property
    def adapter(self):
        return lora.read(self.folder)

    @property
    def mergeable(self):
        return self.merged is not None


def draw_case(seed, folder):
    """Case number `seed`; settings that PEFT itself refuses, or cannot run, are drawn again."""
    from tests.peers import peft_side

    rng = np.random.default_rng([20240614, seed])
    dtype = DTYPES[seed % 4]
    model = model_to_adapt(seed, tied=seed % 3 != 0, square=seed % 10 == 9, weights=dtype)
    written = None
    while written is None:
        options = random_options(rng, model, lambda options: peft_side.targeted(model, options))
        written = peft_side.what_peft_writes(model, options, folder)
    settings, shapes = written
    tensors = draw_tensors(seed, shapes, settings, model)
    write_adapter(folder, settings, tensors, dtype)

    def both(run):
        wide, narrow = (run(peft_side.load(model, folder, float64=wide))[model.real] for wide in (True, False))
        return wide, error(narrow, wide)

    assert peft_side.holds(peft_side.load(model, folder), folder)
    attached = both(lambda peer: peft_side.logits(peer, model))
    merged = None, None
    if not settings["lora_bias"]:
        merged = both(lambda peer: peft_side.logits(peft_side.merged(peer), model))
    return Case(seed, model, folder, dtype, options, settings, tensors, *attached, *merged)
