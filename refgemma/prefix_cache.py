"""Keys and values of a prompt's beginning, kept so that the next prompt that begins alike need not be read again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refgemma.cache import KVCache
from refgemma.config import Config
from refgemma.numerics import Numerics


class PrefixCache:
    """Keys and values of the last run of one row, so that a prompt with the same beginning need not be read again.

    It serves a chat, where every prompt begins with all earlier turns, or a long beginning that many prompts share. It
    holds a plain `KVCache`, which every run forks: runs may overlap without disturbing each other. A run with other
    weights or other arithmetic starts afresh.

    Attributes
    ----------
    tokens : list of int
        Tokens fed so far, in order; slot i of the cache holds token i.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._cache: KVCache | None = None
        self._params: object | None = None
        self._numerics: Numerics | None = None

    def resume(
        self, prompt: Sequence[int], params: object, config: Config, numerics: Numerics, *, xp: Any = np
    ) -> tuple[KVCache, list[int]]:
        """Cache that holds the longest beginning of the prompt that was fed before.

        Parameters
        ----------
        prompt : sequence of int
            Token ids; at least the last one is left to be fed.
        params : Params
            Weights; others, such as those of an adapter, make other keys.
        config : Config
            Shape of the model.
        numerics : Numerics
            Arithmetic of activations.
        xp : module, default numpy
            Array library of the weights.

        Returns
        -------
        cache : KVCache
            With room for the whole context; its `length` is the number of prompt tokens it holds.
        fed : list of int
            Its tokens. A caller that feeds the cache more tokens appends them here afterwards.
        """
        old = self._cache
        if old is None or self._params is not params or self._numerics != numerics:
            old = KVCache(config, batch=1, capacity=config.max_positions, dtype=numerics.dtype, xp=xp)
            self._params, self._numerics = params, numerics
            self.tokens = []
        same = in_common([self.tokens, prompt[:-1]])
        self._cache = old.fork(same, batch=1, capacity=config.max_positions)
        self.tokens = self.tokens[:same]  # a new list: the run before may still append to its own
        return self._cache, self.tokens


def in_common(texts: Sequence[Sequence[int]]) -> int:
    """Count the tokens with which all texts begin."""
    same = 0
    for tokens in zip(*texts, strict=False):
        if len(set(tokens)) > 1:
            break
        same += 1
    return same
