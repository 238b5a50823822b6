"""The doctor: what is wrong with a model folder, found without loading it, so that it serves where `load` refuses.

Families and sizes are told from names and shapes, the convention of the norms from their statistics, damage from the
numbers themselves; every remark says what to do.
"""

from __future__ import annotations

from pathlib import Path

from refgemma.checkpoint.health.folder import Remark, admit
from refgemma.checkpoint.health.numbers import about_norms, about_numbers, look_at
from refgemma.checkpoint.health.shapes import about_shapes, family_of
from refgemma.checkpoint.health.table import about_head, about_vocabulary
from refgemma.checkpoint.load import Progress

_ORDER = ("wrong", "look", "fine")


def examine(folder: str | Path, *, progress: Progress | None = None) -> list[Remark]:
    """Examine a model folder."""
    patient = admit(folder)
    numbers = look_at(patient, progress)
    remarks = [*patient.remarks, *about_shapes(patient), *about_numbers(patient, numbers)]
    if family_of(patient) is not None:
        remarks += [*about_norms(numbers), *about_head(patient), *about_vocabulary(patient, numbers)]
    return sorted(remarks, key=lambda remark: _ORDER.index(remark.grade))
