"""Which operation makes which named tensor, from which others: the data flow that bounds follow.

This is no second copy of the model. It computes nothing; it only knows, for each name that the tap calls out, which
tensors the reference has just used, so that `refgemma.oracle.bounds.rounding` can say how far rounding reaches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from refgemma.config import Config
from refgemma.model import Params
from refgemma.numerics import Array
from refgemma.ops.attention import allowed_keys
from refgemma.oracle.bounds import elementwise, products, rounding
from refgemma.oracle.bounds.arithmetic import Arithmetic
from refgemma.oracle.bounds.slack import Bound, Known, joined
from refgemma.oracle.operations import split_name

_STREAM = ("embed", "attn.residual", "out")  # what the residual stream is, one after the other
_CACHED = ("attn.k_rope", "attn.v")
_CHUNK = 512
_NUMBERS = 2**24  # of one tensor at a time: truth, bounds and theirs are some ten arrays of so many float64 numbers


def chunks(T: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut a text into pieces that are fed one after the other."""
    step = max(1, min(_CHUNK, _NUMBERS // width))
    for start in range(0, T, step):
        yield start, min(start + step, T)


@dataclass
class Flow:
    """Tensors that the running pass goes on with, as far as later ones are made from them."""

    params: Params  # weights
    config: Config  # the model
    arithmetic: Arithmetic  # the engine's
    tokens: Array = field(default_factory=lambda: np.empty((1, 0), np.int64))  # (B, T): Of the chunk that is running
    positions: Array = field(default_factory=lambda: np.empty((1, 0), np.int64))  # (B, T): Of the chunk that is running
    # (B, S): Of it and all chunks before
    key_positions: Array = field(default_factory=lambda: np.empty((1, 0), np.int64))
    _stream: Known = field(default_factory=lambda: Known(np.empty(0)))
    _here: dict[str, Known] = field(default_factory=dict)
    _cached: dict[str, list[Known]] = field(default_factory=dict)

    def next_chunk(self, tokens: Array, positions: Array) -> None:
        """Begin another chunk. tokens, positions (B, T)."""
        self.tokens, self.positions = tokens, positions
        seen = self.key_positions if len(self.key_positions) == len(positions) else positions[:, :0]
        self.key_positions = np.concatenate([seen, positions], axis=1)

    @property
    def allowed(self) -> Array:
        """Which keys each query of this chunk sees, (B, T, S)."""
        return allowed_keys(self.positions, self.key_positions)

    def goes_on_with(self, name: str, value: Known) -> None:
        """Take note of a tensor as the pass goes on with it."""
        _, kind = split_name(name)
        self._here[kind] = value
        if kind in _STREAM:
            self._stream = value
        if kind in _CACHED:
            self._cached.setdefault(name, []).append(value)
            self._here[kind] = joined(self._cached[name], axis=1)

    def inputs(self, name: str) -> dict[str, Array]:
        """Tensors of the same layer that were named before, for finding out what a wrong one was taken from."""
        return {kind: known.value for kind, known in self._here.items() if kind != name}

    def bound_of(self, name: str, y: Array) -> Bound:
        """Bound of the tensor that was just computed."""
        i, kind = split_name(name)
        a, c, here, stream = self.arithmetic, self.config, self._here, self._stream
        if i is None:
            if kind == "embed":
                return rounding.embedding(y, self.tokens, self.params["embed"], a)
            if kind == "final_norm":
                return rounding.norm(y, stream, self.params["final_norm"], c.rms_norm_eps, a)
            return products.product(y, here["final_norm"], self.params["head"], a)
        attn, mlp = self.params["layers"][i]["attn"], self.params["layers"][i]["mlp"]
        flat = y.reshape(*y.shape[:2], -1)  # heads side by side, as matrix products give them
        match kind:
            case "attn.norm":
                return rounding.norm(y, stream, attn["norm"], c.rms_norm_eps, a)
            case "attn.q":
                return _split(products.product(flat, here["attn.norm"], attn["q"], a), y.shape)
            case "attn.k":
                return _split(products.product(flat, here["attn.norm"], attn["k"], a), y.shape)
            case "attn.v":
                return _split(products.product(flat, here["attn.norm"], attn["v"], a), y.shape)
            case "attn.q_rope" | "attn.k_rope":
                return elementwise.rotation(y, here[kind.removesuffix("_rope")], self.positions, c.rope_theta, a)
            case "attn.scores":
                return products.scores(y, here["attn.q_rope"], here["attn.k_rope"], c.query_scale, a)
            case "attn.probs":
                return elementwise.softmax(y, here["attn.scores"], self.allowed, a)
            case "attn.mix":
                return products.mix(y, here["attn.probs"], here["attn.v"], self.allowed.sum(axis=-1), a)
            case "attn.out":
                mixed = here["attn.mix"].map(lambda t: t.reshape(*t.shape[:2], -1))
                return products.product(y, mixed, attn["out"], a)
            case "attn.residual":
                return rounding.added(y, stream, here["attn.out"], kind, a)
            case "mlp.norm":
                return rounding.norm(y, stream, mlp["norm"], c.rms_norm_eps, a)
            case "mlp.gate":
                return products.product(y, here["mlp.norm"], mlp["gate"], a)
            case "mlp.up":
                return products.product(y, here["mlp.norm"], mlp["up"], a)
            case "mlp.act":
                return elementwise.gelu(y, here["mlp.gate"], a)
            case "mlp.gated":
                return elementwise.gated(y, here["mlp.act"], here["mlp.up"], a)
            case "mlp.down":
                return products.product(y, here["mlp.gated"], mlp["down"], a)
            case _:
                return rounding.added(y, stream, here["mlp.down"], kind, a)


def _split(bound: Bound, shape: tuple[int, ...]) -> Bound:
    """Bound with the heads apart."""
    worst, likely, variance = (part.reshape(shape) for part in (bound.worst, bound.likely, bound.variance))
    return Bound(worst, likely, variance, bound.reason)
