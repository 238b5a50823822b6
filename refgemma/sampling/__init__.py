"""From logits to a token: settings, the pure steps that act on logits, one decision, and the record of many.

A sampler here is a list of steps ``logits -> logits`` whose order is visible (`steps_of`); a removed token has a logit
of minus infinity.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refgemma.sampling.decision import Decision, Stage, decide, steps_of, uniform
from refgemma.sampling.entry import Candidate, Entry, StepRecord
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.record import Record, Replay, read_record, record_logits, write_record

if TYPE_CHECKING:
    from refgemma.sampling.comparison import Comparison, compare

__all__ = [
    "Candidate",
    "Comparison",
    "Decision",
    "Entry",
    "Record",
    "Replay",
    "SamplingParams",
    "Stage",
    "StepRecord",
    "compare",
    "decide",
    "read_record",
    "record_logits",
    "steps_of",
    "uniform",
    "write_record",
]


def __getattr__(name: str) -> Any:
    if name in ("Comparison", "compare"):  # on first use: they bring the rules of all engines
        return getattr(import_module("refgemma.sampling.comparison"), name)
    raise AttributeError(f"module 'refgemma.sampling' has no attribute {name!r}")
