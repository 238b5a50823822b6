"""The two hosted models as their pages describe them: request schema, context, default temperature.

The schemas are kept as data, one file a page, with the page's address and age; prose was left out. They differ: the
newer page (2B) allows longer texts and knows `image`, `functions`, `tools` and a default temperature.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

GEMMA_2B = "@cf/google/gemma-2b-it-lora"
GEMMA_7B = "@cf/google/gemma-7b-it-lora"
HOSTED = (GEMMA_2B, GEMMA_7B)


@dataclass(frozen=True, kw_only=True)
class Page:
    """A hosted model."""

    model: str  # its name
    source: str  # address of the page
    as_of: str  # when it was read
    context: int  # tokens of prompt and answer together
    schema: dict[str, Any]  # JSON Schema of a request: one of two branches, by `prompt` or by `messages`

    def branch(self, form: str) -> dict[str, Any]:
        """Schema of a form of request."""
        branches: list[dict[str, Any]] = self.schema["oneOf"]
        return next(branch for branch in branches if form in branch["properties"])

    def fields(self, form: str) -> dict[str, Any]:
        """Fields that a form of request declares."""
        fields: dict[str, Any] = self.branch(form)["properties"]
        return fields


@functools.cache
def page(model: str) -> Page:
    """Page of a hosted model."""
    if model not in HOSTED:
        raise KeyError(model)
    file = resources.files("refgemma.workers_ai") / "data" / f"{model.rpartition('/')[2]}.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    return Page(**{name: facts[name] for name in ("model", "source", "as_of", "context", "schema")})
