"""A model held against every figure that others have published for it: computed here, compared, and said one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from refgemma.checkpoint.load import Progress
from refgemma.checkpoint.published import FAMILIES
from refgemma.gemma import Gemma
from refgemma.oracle.published.figures import Figure, kinds_of, models
from refgemma.oracle.published.golden import measure_golden
from refgemma.oracle.published.measures import Measured, measure

Verdict = Literal["holds", "differs", "not computed"]

# Words for kinds of figures, in the order of their sharpness.
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
    """One figure and what became of it."""

    figure: Figure  # what was published
    verdict: Verdict  # "holds", "differs", or "not computed" where this model cannot give such a figure
    measured: Measured | None  # ours beside it; None if it was not computed
    problem: str | None  # what is wrong, in a sentence

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        figure, measured = self.figure, self.measured
        return {
            "id": figure.id,
            "kind": figure.kind,
            "verdict": self.verdict,
            "published": figure.fields.get("expected", figure.fields.get("continuations")),
            "ours": measured.values if measured else None,
            "worst": {"published": measured.published, "ours": measured.ours} if measured else None,
            "tolerance": measured.tolerance if measured else None,
            "reason": figure.reason,
            "problem": self.problem,
            "source": figure.url,
            "note": figure.note,
            "trust": figure.trust,
            "computed_in": figure.computed_in,
        }


def verify(gemma: Gemma, figures: Iterable[Figure], *, progress: Progress | None = None) -> Iterator[Outcome]:
    """Hold a model against figures."""
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
    """Say which figures exist for a model, and which do not."""
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
