"""Which model a folder holds, as far as published figures go: by checksums of some tensors, or by shape and name.

Nothing is guessed: where the shape leaves several models and neither tensors nor name decide, all of them are named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refgemma.config import SIZES, Config
from refgemma.files.safetensors import StoredTensor
from refgemma.oracle.published.figures import models, parameter_counts

# Small, and different in every training run.
CHECKED = ("model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.v_proj.weight")


@dataclass(frozen=True)
class Recognised:
    """What is known of a folder."""

    model: str | None  # the model that figures are of; None if that is not clear
    how: str  # why, or why not, in words
    candidates: tuple[str, ...]  # models of that shape
    checksums: Mapping[str, str]  # SHA-256 of the tensors of `CHECKED`, as they are stored


def recognise(folder: Path, config: Config, stored: Mapping[str, StoredTensor]) -> Recognised:
    """Tell which model a folder holds."""
    known = models()
    sums = checksums(stored)
    shape = next((name for name, size in SIZES.items() if size == config), None)
    candidates = tuple(name for name, about in known.items() if shape is not None and about.get("shape") == shape)
    for name, about in known.items():
        if about.get("checksums") and about["checksums"] == sums:
            return Recognised(name, f"by the checksums of {len(sums)} tensors", (name,), sums)
    named = name_of(folder)
    if named in candidates:
        how = "by its name and configuration (checksums of the released tensors are not public)"
        return Recognised(named, how, candidates, sums)
    if named in known and known[named].get("checksums"):
        how = f"it is named {named}, but its tensors are not those that the figures of {named} were recorded with"
    elif shape is None:
        how = "its configuration is that of no model with figures"
    else:
        how = f"its configuration is that of {' and '.join(candidates)} alike (and of CodeGemma of that size)"
    return Recognised(None, how, candidates, sums)


def name_of(folder: Path) -> str:
    """Name of a model by its folder."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.rpartition("--")[2]
    return folder.name


def checksums(stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """SHA-256 of a few tensors."""
    sums = {}
    for name in CHECKED:
        if name in stored:
            tensor = stored[name]
            digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
            digest.update(tensor.data.tobytes())
            sums[name] = digest.hexdigest()
    return sums


def about_parameters(config: Config, model: str) -> str:
    """How many parameters there are, held against the published number."""
    shape = models().get(model, {}).get("shape", model)
    here = f"{config.num_parameters:,} parameters"
    if shape not in parameter_counts():
        return here
    count, url = parameter_counts()[shape]
    return f"{here}, as published ({url})" if count == config.num_parameters else f"{here}; published {count:,} ({url})"
