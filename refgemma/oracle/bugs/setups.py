"""How a port of Gemma computes: weights, what is fed, and in which habits it departs from Gemma."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from refgemma.config import Config
from refgemma.model import Params
from refgemma.numerics import FLOAT64, Array, Numerics


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """What is run, and how; by default as Gemma does it."""

    params: Params  # weights
    config: Config  # shape and constants
    tokens: Array  # (B, T): What is fed; positions are absolute, -1 for padding
    positions: Array  # (B, T): What is fed; positions are absolute, -1 for padding
    numerics: Numerics = FLOAT64  # arithmetic of activations
    # how often sqrt(D) multiplies the rows of the table
    embedding: Literal["scaled", "bare", "scaled twice"] = "scaled"
    head_scaled: bool = False  # whether sqrt(D) multiplies the logits, too
    # each norm before its block, or after the residual add; or the second one on attention's output
    norms: Literal["before", "after", "as in Gemma 2"] = "before"
    eps_outside: bool = False  # whether eps is added to the root instead of inside it
    # whether norms square their input as it is, or round it, its squares and their mean to bfloat16
    squares: Literal["wide", "bfloat16"] = "wide"
    turned_by: Array | None = None  # (B, T): Positions that rotary angles are formed from; None for `positions`
    lanes: Literal["halves", "neighbours"] = "halves"  # lane i turns together with lane i + H/2, or 2i with 2i + 1
    heads: Literal["grouped", "in turn"] = "grouped"  # query head n reads key head n // G, or n % K
    # whether a query meets keys as they were written down, or before they were rounded
    fresh_keys: Literal["rounded", "wide"] = "rounded"
    activation: Literal["tanh", "erf", "silu"] = "tanh"  # GELU in either form, or SiLU
    activated: Literal["gate", "up"] = "gate"  # which of the two goes through it

    @property
    def odd_norm(self) -> bool:
        """Whether norms divide by something else."""
        return self.eps_outside or self.squares != "wide"

    def but(self, **fields: Any) -> Setup:
        """Same setup with some fields changed."""
        return replace(self, **fields)
