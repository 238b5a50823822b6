"""From logits to a token: settings, the pure steps that act on logits, one decision, and the record of many.

A sampler here is a list of steps ``logits -> logits`` whose order is visible (`steps_of`); a removed token has a logit
of minus infinity.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refgemma.sampling.decision import Decision, Stage, decide, steps_of, uniform
from refgemma.sampling.entry import Candidate, Entry, StepRecord
from refgemma.sampling.params import SamplingParams
from refgemma.sampling.record import Record
from refgemma.sampling.replay import Replay

if TYPE_CHECKING:
    from refgemma.sampling.by_hand import record_logits
    from refgemma.sampling.comparison import Comparison, compare
    from refgemma.sampling.record_file import read_record, write_record

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

_ON_FIRST_USE = {  # other engines, and files
    "Comparison": "comparison",
    "compare": "comparison",
    "read_record": "record_file",
    "record_logits": "by_hand",
    "write_record": "record_file",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'refgemma.sampling' has no attribute {name!r}")
    return getattr(import_module(f"refgemma.sampling.{_ON_FIRST_USE[name]}"), name)
