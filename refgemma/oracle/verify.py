"""A model held against every figure that others have published for it: computed here, compared, and said one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from refgemma.checkpoint.load import Progress
from refgemma.gemma import Gemma
from refgemma.oracle.figures import FAMILIES, Figure, kinds_of, models
from refgemma.oracle.golden import measure_golden
from refgemma.oracle.measures import Measured, measure

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
    """One figure and what became of it.

    Attributes
    ----------
    figure : Figure
        What was published.
    verdict : str
        "holds", "differs", or "not computed" where this model cannot give such a figure.
    measured : Measured or None
        Ours beside it; None if it was not computed.
    problem : str or None
        What is wrong, in a sentence.
    """

    figure: Figure
    verdict: Verdict
    measured: Measured | None
    problem: str | None

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON.

        Returns
        -------
        dict
            Of texts, numbers and lists.
        """
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
    """Hold a model against figures.

    Parameters
    ----------
    gemma : Gemma
        The model.
    figures : iterable of Figure
        From `refgemma.oracle.figures.figures_of`, `read_figures`, or a golden file.
    progress : callable, optional
        ``progress(done, total)``, in figures; only where their number is known.

    Yields
    ------
    Outcome
        One a figure, in their order, each as soon as it is there.
    """
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
    """Say which figures exist for a model, and which do not.

    Parameters
    ----------
    model : str
        A name in `refgemma.oracle.figures.models`.

    Returns
    -------
    str
        A line.

    Examples
    --------
    >>> on_record("gemma-1.1-7b-it").partition(". ")[0]
    'gemma-1.1-7b-it: cross entropies (3), replies (6)'
    """
    kinds = kinds_of(model)
    parts = [f"{words} ({kinds[kind]})" for kind, words in KINDS.items() if kind in kinds]
    lacks = models().get(model, {}).get("lacks", "")
    return f"{model}: {', '.join(parts) or 'no figures'}.{' ' if lacks else ''}{lacks}"


def all_on_record() -> dict[str, list[str]]:
    """Which figures exist, for every model.

    Returns
    -------
    dict of str to list of str
        A line a model, by family.
    """
    families: dict[str, list[str]] = {words: [] for words in FAMILIES.values()}
    for name, about in models().items():
        families[FAMILIES[about["family"]]].append(on_record(name))
    return families
