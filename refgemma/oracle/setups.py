"""How a port of Gemma computes: weights, what is fed, and in which habits it departs from Gemma."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from refgemma.config import Config
from refgemma.model import Params
from refgemma.numerics import FLOAT64, Array, Numerics


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """What is run, and how; by default as Gemma does it.

    Attributes
    ----------
    params : Params
        Weights.
    config : Config
        Shape and constants.
    tokens, positions : ndarray of int, shape (B, T)
        What is fed; positions are absolute, -1 for padding.
    numerics : Numerics
        Arithmetic of activations.
    embedding : {"scaled", "bare", "scaled twice"}
        How often sqrt(D) multiplies the rows of the table.
    head_scaled : bool
        Whether sqrt(D) multiplies the logits, too.
    norms : {"before", "after", "as in Gemma 2"}
        Each norm before its block, or after the residual add; or the second one on attention's output.
    eps_outside : bool
        Whether eps is added to the root instead of inside it.
    squares : {"wide", "bfloat16"}
        Whether norms square their input as it is, or round it, its squares and their mean to bfloat16.
    turned_by : ndarray, shape (B, T), or None
        Positions that rotary angles are formed from; None for `positions`.
    lanes : {"halves", "neighbours"}
        Lane i turns together with lane i + H/2, or 2i with 2i + 1.
    heads : {"grouped", "in turn"}
        Query head n reads key head n // G, or n % K.
    fresh_keys : {"rounded", "wide"}
        Whether a query meets keys as they were written down, or before they were rounded.
    activation : {"tanh", "erf", "silu"}
        GELU in either form, or SiLU.
    activated : {"gate", "up"}
        Which of the two goes through it.
    """

    params: Params
    config: Config
    tokens: Array
    positions: Array
    numerics: Numerics = FLOAT64
    embedding: Literal["scaled", "bare", "scaled twice"] = "scaled"
    head_scaled: bool = False
    norms: Literal["before", "after", "as in Gemma 2"] = "before"
    eps_outside: bool = False
    squares: Literal["wide", "bfloat16"] = "wide"
    turned_by: Array | None = None
    lanes: Literal["halves", "neighbours"] = "halves"
    heads: Literal["grouped", "in turn"] = "grouped"
    fresh_keys: Literal["rounded", "wide"] = "rounded"
    activation: Literal["tanh", "erf", "silu"] = "tanh"
    activated: Literal["gate", "up"] = "gate"

    @property
    def odd_norm(self) -> bool:
        """Whether norms divide by something else."""
        return self.eps_outside or self.squares != "wide"

    def but(self, **fields: Any) -> Setup:
        """Same setup with some fields changed.

        Parameters
        ----------
        **fields
            Fields and their values.

        Returns
        -------
        Setup
            A new one.
        """
        return replace(self, **fields)
