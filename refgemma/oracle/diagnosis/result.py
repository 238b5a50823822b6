"""What a diagnosis found: causes in order, and how sure it is of the first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from refgemma.errors import grouped
from refgemma.oracle.bounds.arithmetic import arithmetic_of
from refgemma.oracle.bugs.catalogue import Bug
from refgemma.oracle.bugs.locations import words
from refgemma.oracle.thresholds import TIE

_FINE = ("A2", "B4", "B5", "B6", "G1")  # bugs that bfloat16 logits show on none of the models tried


@dataclass(frozen=True)
class Cause:
    """One explanation of another engine's numbers, and how well it does."""

    bugs: tuple[Bug, ...]  # the known bugs it consists of: one or two; none for the honest reference
    ratio: float  # largest error over its bound that is left; at most 1 if it explains everything
    misfit: float  # mean difference over mean magnitude that is left, of the tensor where that is largest
    left: tuple[str, ...]  # tensors that are still wrong
    # for each bug the tensors that it moves, if it is in some places only: empty for one that is everywhere
    only: tuple[tuple[str, ...], ...] = ()
    undecided: tuple[tuple[str, ...], ...] = ()  # for each bug the tensors of places where it would not show

    @property
    def explains(self) -> bool:
        """Whether nothing is left that is wrong."""
        return not self.left

    @property
    def keys(self) -> tuple[str, ...]:
        """Names in the catalogue."""
        return tuple(bug.key for bug in self.bugs)

    @property
    def places(self) -> tuple[str, ...]:
        """Where each bug is, such as "in layer 3 only"; empty for one that is everywhere."""
        only = self.only or ((),) * len(self.bugs)
        return tuple(words(names, one.where) if names else "" for one, names in zip(self.bugs, only, strict=True))

    @property
    def name(self) -> str:
        """Bugs and places, such as "GELU by erf (C1), in layer 3 only"."""
        both = zip(self.bugs, self.places, strict=True)
        return " and ".join(f"{one.title} ({one.key})" + (f", {place}" if place else "") for one, place in both)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for programs."""
        shown = ("key", "title", "sentence", "thread", "kind")
        return {
            "name": self.name,
            "variants": [  # the name of this key is part of `diagnose --json`
                {name: getattr(bug, name) for name in shown} | {"place": place or "everywhere"}
                for bug, place in zip(self.bugs, self.places, strict=True)
            ],
            "only": [list(names) for names in self.only],
            "undecided": [list(names) for names in self.undecided],
            "explains": self.explains,
            "ratio": self.ratio,
            "misfit": self.misfit,
            "left": list(self.left),
        }


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Why another engine computed what it did.

    Parameters
    ----------
    causes : tuple of Cause
        Explanations, best first: those that explain everything, then those that explain some of it. Empty if none is
        needed.
    honest : Cause
        The reference as it is.
    basis : {"trace", "logits"}
        What was compared: each operation on its own inputs, or final logits alone.
    arithmetic : str
        What the candidate's numbers were taken to be computed in.
    closer : tuple of Cause
        Where nothing is wrong: bugs that come ten times closer to the candidate than the reference does, or more.
        Mostly choices of rounding that engines make differently, in good faith; or a bug too small to be sure of.
    fed : Bug or None
        What the tokens alone show: <bos> missing or double.
    pairs : bool
        Whether two bugs at once would have been tried.
    overflow : str
        First tensor that holds NaN, or numbers too large to be squared: nothing is judged from there on. Empty if there
        is none.
    notes : tuple of str
        What was assumed in reading the file.
    """

    causes: tuple[Cause, ...]
    honest: Cause
    basis: str
    arithmetic: str
    closer: tuple[Cause, ...] = ()
    fed: Bug | None = None
    pairs: bool = True
    overflow: str = ""
    notes: tuple[str, ...] = ()

    @property
    def needed(self) -> bool:
        """Whether there is anything to explain; of an overflow, before it."""
        return not self.honest.explains

    @property
    def ok(self) -> bool:
        """Whether all is well: nothing to explain, no overflow, and nothing wrong with what was fed."""
        return not self.needed and not self.overflow and self.fed is None

    @property
    def hides(self) -> bool:
        """Whether fine bugs are smaller than rounding: in final logits alone, in narrow arithmetic."""
        return self.basis == "logits" and arithmetic_of(self.arithmetic).storage in ("bfloat16", "float16")

    @property
    def first(self) -> Cause | None:
        """Best explanation of all; None if none is needed, or none is found."""
        return self.causes[0] if self.causes and self.causes[0].explains else None

    @property
    def tied(self) -> tuple[Cause, ...]:
        """Explanations that these numbers cannot tell from the first, the first among them; empty if it is alone."""
        if self.first is None:
            return ()
        limit = TIE * self.first.misfit
        equal = tuple(cause for cause in self.causes if cause.explains and cause.misfit <= limit)
        return equal if len(equal) > 1 else ()

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.needed:
            right = "no known bug needed: all of it is inside rounding"
            if self.hides:
                right += ", behind which fine bugs hide"
            if self.overflow:
                right = f"{self.overflow} holds NaN or overflows, and all before it is inside rounding"
            return right if self.fed is None else f"{right}; but fed wrongly, {self.fed.title} ({self.fed.key})"
        if self.first is None:
            return "no known bug explains it" + (", alone or with another" if self.pairs else " alone")
        if self.tied:
            return f"one of {' or '.join(cause.name for cause in self.tied)}: these numbers cannot tell which"
        kinds = {bug.kind for bug in self.first.bugs}
        return ("a rounding profile: " if kinds == {"profile"} else "") + self.first.name

    def text(self) -> str:
        """Write all of it, for people.

        Returns
        -------
        str
            The verdict, then a line on each bug it names.
        """
        basis = "each operation on its own inputs" if self.basis == "trace" else "final logits alone"
        lines = [self.verdict, f"  judged as {self.arithmetic}, by {basis}"]
        if self.overflow:
            lines.append(f"  {self.overflow} holds NaN or overflows: causes are sought before it")
        if self.hides and not self.needed:
            fine = f"fine bugs, such as {', '.join(_FINE)}"
            lines.append(f"  {self.arithmetic} logits alone cannot show {fine}: rounding moves logits further")
            lines.append("  a trace of what each layer computes would show them")
        shown = self.tied or ((self.first,) if self.first else ())
        for bug in _unique(bug for cause in shown for bug in cause.bugs):
            lines += [f"  {bug.key}: {bug.sentence}", f"    {bug.thread}"]
        for key, names in _undecided(shown).items():
            lines.append(f"  {key} would not show in {', '.join(grouped(list(names)))}: it may be there as well")
        if self.first is not None:
            lines.append(
                f"  with it, the largest error is {self.first.ratio:.2g} of its bound, not {self.honest.ratio:.3g}"
            )
        elif self.needed:
            lines.append(f"  wrong: {', '.join(grouped(list(self.honest.left)))}")
            partly = [cause for cause in self.causes if len(cause.left) < len(self.honest.left)][:3]
            lines += [f"  {one.name} would leave {', '.join(grouped(list(one.left)))}" for one in partly]
            if self.basis == "logits":
                lines.append(
                    "  a bug in some layers only is found in a trace of what each layer computes, not in logits"
                )
        for cause in self.closer:
            lines.append(f"  closer, though inside rounding without it: {cause.name}, mean error {cause.misfit:.1g}")
        if self.fed is not None:
            lines += [f"  tokens: {self.fed.key}, {self.fed.sentence}", f"    {self.fed.thread}"]
        if self.notes:
            lines += ["read as", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Give all of it, for programs.

        Returns
        -------
        dict
            What ``diagnose --json`` prints.
        """
        return {
            "verdict": self.verdict,
            "ok": self.ok,
            "needed": self.needed,
            "first": None if self.first is None else self.first.as_dict(),
            "tied": [list(cause.keys) for cause in self.tied],
            "causes": [cause.as_dict() for cause in self.causes],
            "honest": self.honest.as_dict(),
            "closer": [cause.as_dict() for cause in self.closer],
            "fed": None if self.fed is None else self.fed.key,
            "basis": self.basis,
            "arithmetic": self.arithmetic,
            "overflow": self.overflow,
            "hides": self.hides,
            "notes": list(self.notes),
        }


def _undecided(causes: Iterable[Cause]) -> dict[str, tuple[str, ...]]:
    """By key, places where a bug may be or not."""
    return {key: names for cause in causes for key, names in zip(cause.keys, cause.undecided, strict=False) if names}


def _unique(bugs: Iterable[Bug]) -> list[Bug]:
    return list({bug.key: bug for bug in bugs}.values())
