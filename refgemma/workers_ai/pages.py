"""The two hosted models as their pages describe them: request schema, context, default temperature.

The schemas are data, one file per page, with the page's address and date and without its prose. They differ: the newer
page (2B) allows longer texts and declares `image`, `functions`, `tools` and a default temperature.
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

    model: str
    source: str  # address of the page
    as_of: str  # when it was read
    context: int  # tokens, of prompt and answer together
    schema: dict[str, Any]  # JSON Schema of a request: one of two branches, with `prompt` or with `messages`

    def branch(self, form: str) -> dict[str, Any]:
        """Return the branch for requests with a field, `prompt` or `messages`."""
        branches: list[dict[str, Any]] = self.schema["oneOf"]
        return next(branch for branch in branches if form in branch["properties"])

    def fields(self, form: str) -> dict[str, Any]:
        """Return the fields that this branch declares."""
        fields: dict[str, Any] = self.branch(form)["properties"]
        return fields


@functools.cache
def page(model: str) -> Page:
    """Return the page of a hosted model."""
    if model not in HOSTED:
        raise KeyError(model)
    file = resources.files("refgemma.workers_ai") / "data" / f"{model.rpartition('/')[2]}.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    return Page(**{name: facts[name] for name in ("model", "source", "as_of", "context", "schema")})
