"""Which model a folder holds, and whether that model reproduces every figure that others have published for it.

A model is recognised by checksums of some tensors, or by shape and name. Nothing is guessed: where the shape fits
several models and neither tensors nor name decide, all of them are listed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from refgemma.checkpoint.load import Progress
from refgemma.checkpoint.names import FAMILIES
from refgemma.config import SIZES, Config
from refgemma.files.safetensors import StoredTensor
from refgemma.gemma import Gemma
from refgemma.oracle.published.figures import Figure, kinds_of, models, parameter_counts
from refgemma.oracle.published.golden import measure_golden
from refgemma.oracle.published.measures import Measured, measure

Verdict = Literal["holds", "differs", "not computed"]

# Words for kinds of figures, sharpest first.
KINDS = {
    "logits_slice": "logits",
    "logit_mean": "mean logits",
    "hidden_slice": "hidden states",
    "token_logprob": "log-probabilities",
    "topk_prob": "probabilities",
    "entropy": "entropies",
    "cross_entropy": "cross entropies",
    "greedy_text": "greedy texts",
    "reply_contains": "replies",
}


@dataclass(frozen=True)
class Outcome:
    """One figure and its verdict."""

    figure: Figure  # what was published
    verdict: Verdict  # "holds", "differs", or "not computed" where this model cannot give such a figure
    measured: Measured | None  # None if it was not computed
    problem: str | None  # what is wrong, in a sentence

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        figure, measured = self.figure, self.measured
        return {
            "id": figure.id,
            "kind": figure.kind,
            "verdict": self.verdict,
            "published": figure.fields.get("expected", figure.fields.get("continuations")),
            "ours": measured.values if measured else None,  # keys of `verify --json`
            "worst": {"published": measured.published, "ours": measured.computed} if measured else None,
            "tolerance": measured.tolerance if measured else None,
            "reason": figure.reason,
            "problem": self.problem,
            "source": figure.url,
            "note": figure.note,
            "trust": figure.trust,
            "computed_in": figure.computed_in,
        }


def verify(gemma: Gemma, figures: Iterable[Figure], *, progress: Progress | None = None) -> Iterator[Outcome]:
    """Check a model against figures."""
    total = len(figures) if isinstance(figures, (list, tuple)) else 0
    for done, figure in enumerate(figures, 1):
        try:
            measured = measure_golden(gemma, figure) if figure.kind == "golden" else measure(gemma, figure)
        except ValueError as error:
            yield Outcome(figure, "not computed", None, str(error))
        else:
            yield Outcome(figure, "differs" if measured.problem else "holds", measured, measured.problem)
        if progress is not None and total:
            progress(done, total)


def on_record(model: str) -> str:
    """Which figures exist for a model, and which do not, in words."""
    kinds = kinds_of(model)
    parts = [f"{words} ({kinds[kind]})" for kind, words in KINDS.items() if kind in kinds]
    lacks = models().get(model, {}).get("lacks", "")
    return f"{model}: {', '.join(parts) or 'no figures'}.{' ' if lacks else ''}{lacks}"


def all_on_record() -> dict[str, list[str]]:
    """Which figures exist, for every model."""
    families: dict[str, list[str]] = {words: [] for words in FAMILIES.values()}
    for name, about in models().items():
        families[FAMILIES[about["family"]]].append(on_record(name))
    return families


# ---- which model

# Small, and different in every training run.
CHECKED = ("model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.v_proj.weight")


@dataclass(frozen=True)
class Recognised:
    """Which model a folder holds."""

    model: str | None  # name of the model; None if that is not clear
    how: str  # why, or why not, in words
    candidates: tuple[str, ...]  # models of that shape
    checksums: Mapping[str, str]  # SHA-256 of the tensors of `CHECKED`, as they are stored


def recognise(folder: Path, config: Config, stored: Mapping[str, StoredTensor]) -> Recognised:
    """Recognise which model a folder holds."""
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
        how = f"it is named {named}, but its tensors differ from those that the figures of {named} were recorded with"
    elif shape is None:
        how = "its configuration matches no model with figures"
    else:
        how = f"its configuration fits {' and '.join(candidates)} equally (and CodeGemma of that size)"
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
    """The number of parameters, beside the published one."""
    shape = models().get(model, {}).get("shape", model)
    here = f"{config.num_parameters:,} parameters"
    if shape not in parameter_counts():
        return here
    count, url = parameter_counts()[shape]
    return f"{here}, as published ({url})" if count == config.num_parameters else f"{here}; published {count:,} ({url})"
