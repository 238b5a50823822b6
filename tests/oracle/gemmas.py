"""Random models as `Gemma` objects, and their dumps in the form of other engines."""

import numpy as np

from refgemma import Gemma
from refgemma.model import forward
from refgemma.numerics import FLOAT64, PROFILES
from tests.models import widened


def gemma_of(model, numerics="float32"):
    """A `tests.models.Model` as users have it; without a tokenizer, which no trace needs."""
    profile = PROFILES[numerics]
    params = widened(model.params) if profile is FLOAT64 else model.params
    return Gemma(model.config, params, None, profile, frozenset())


def tapped(gemma, model):
    """Every named tensor of one plain run, copied; scores of keys that a query does not see are 0."""
    seen = {}
    real = model.positions >= 0
    visible = real[:, None] & (model.positions[:, None] <= model.positions[:, :, None])  # BTS

    def tap(name, value):
        scores = name.endswith(("scores", "probs"))
        seen[name] = np.where(visible[:, None], value, 0) if scores else value.copy()
        return value

    forward(gemma.params, gemma.config, model.tokens, positions=model.positions, numerics=gemma.numerics, tap=tap)
    return seen
