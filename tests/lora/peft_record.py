"""What PEFT computed for sixteen small adapters, so that no torch is needed to compare: tests/goldens/peft_cases.

The record holds the settings of each, and the names and shapes of its tensors, as PEFT wrote them; models and values
are drawn again, and their digests tell whether they are those of the record.
"""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.judge import UNIT
from tests.lora.peft_folders import digest, draw_tensors, model_to_adapt
from tests.models import Model
from tests.models import digest as digest_of_model

GOLDEN = Path(__file__).parents[1] / "goldens" / "peft_cases.json"
POSITIONS = 6
REMAKE = "remake the record, with torch, transformers and peft: python -m tests.peers.make_peft_golden"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """An adapter, the model it is for, and what PEFT computes."""

    name: str
    dtype: str  # of the file
    settings: dict = field(repr=False)  # adapter_config.json
    tensors: dict = field(repr=False)
    model: Model = field(repr=False)
    attached: np.ndarray = field(repr=False)  # float64, (POSITIONS, V): of the first row, at its last positions
    attached_error: float  # of PEFT's logits in float32

    def kept(self, logits):
        """Those of logits at all real positions, (positions, V), that the record holds: the first row comes first."""
        T = self.model.tokens.shape[1]
        return logits[T - POSITIONS : T]


@functools.cache
def recorded():
    """The cases, by name; fails where they are not those of the record."""
    certificate = json.loads(GOLDEN.read_text(encoding="utf-8"))
    with np.load(GOLDEN.with_suffix(".npz")) as arrays:
        logits = arrays["logits"]
    cases, start = {}, 0
    for entry in certificate["cases"]:
        model = model_to_adapt(entry["seed"], **entry["model"], num_layers=2)
        tensors = draw_tensors(entry["seed"], entry["shapes"], entry["settings"], model)
        if entry["digests"] != [digest_of_model(model), digest(tensors)]:
            pytest.fail(f"{entry['name']} is another adapter, or for another model: {REMAKE}")
        stop = start + POSITIONS * model.config.vocab_size
        cases[entry["name"]] = Recorded(
            name=entry["name"],
            dtype=entry["dtype"],
            settings=entry["settings"],
            tensors=tensors,
            model=model,
            attached=logits[start:stop].reshape(POSITIONS, -1),
            attached_error=entry["float32_error"] * UNIT,
        )
        start = stop
    return cases
