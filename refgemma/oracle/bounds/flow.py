"""The data flow that bounds follow: the tensors that each operation was just made from, and the bound of its kind.

It computes nothing of the model: `refgemma.oracle.operations` says what each named tensor is made from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from refgemma.config import Config
from refgemma.numerics import Array
from refgemma.ops.attention import allowed_keys
from refgemma.oracle.bounds import elementwise, products, sums
from refgemma.oracle.bounds.arithmetic import Arithmetic
from refgemma.oracle.bounds.slack import Bound, Known, joined
from refgemma.oracle.operations import OPERATIONS, split_name, weight_of
from refgemma.params import Params

_CACHED = ("attn.k_rope", "attn.v")
_CHUNK = 512
_NUMBERS = 2**24  # of one tensor at a time; truth, bounds and the candidate take some ten float64 arrays of that size


def chunks(config: Config, B: int, T: int, *, logits: bool) -> Iterator[tuple[int, int]]:
    """Cut a text into pieces that are fed one after the other; `logits` of all positions are the widest product."""
    width = max(config.vocab_size if logits else 1, max(row.intermediate_size for row in config.layers))
    step = max(1, min(_CHUNK, _NUMBERS // (B * width)))
    for start in range(0, T, step):
        yield start, min(start + step, T)


@dataclass
class Flow:
    """The tensors that the running pass continues with, from which later ones are made."""

    params: Params  # weights
    config: Config  # the model
    arithmetic: Arithmetic  # the engine's
    tokens: Array = field(default_factory=lambda: np.empty((1, 0), np.int64))  # BT, of this chunk
    positions: Array = field(default_factory=lambda: np.empty((1, 0), np.int64))  # BT, of this chunk
    # BS, of this and all chunks before
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
        """Note a tensor as the pass continues with it."""
        _, kind = split_name(name)
        self._here[kind] = value
        if kind in ("embed", "out"):
            self._stream = value
        if kind in _CACHED:
            self._cached.setdefault(name, []).append(value)
            self._here[kind] = joined(self._cached[name], axis=1)

    def inputs(self, name: str) -> dict[str, Array]:
        """Tensors named before in this layer: a wrong one may equal one of them."""
        return {kind: known.value for kind, known in self._here.items() if kind != name}

    def bound_of(self, name: str, y: Array) -> Bound:
        """Bound of the tensor that was just computed."""
        row = OPERATIONS[split_name(name)[1]]
        a, eps = self.arithmetic, self.config.rms_norm_eps
        c = self.config.layers[split_name(name)[0] or 0]
        w = weight_of(name, self.params)
        if row.kind == "embedding":
            return elementwise.embedding(y, self.tokens, w, a)
        made_from = (source for source in row.made_from if source not in ("tokens", "positions"))
        x, *other = (self._stream if source == "stream" else self._here[source] for source in made_from)
        match row.kind:
            case "norm":
                return sums.norm(y, x, w, eps, a)
            case "product":  # heads lie side by side in it
                flat = y.reshape(*y.shape[:2], -1)
                return products.product(flat, x.map(lambda t: t.reshape(*t.shape[:2], -1)), w, a).reshape(y.shape)
            case "rotation":
                return elementwise.rotation(y, x, self.positions, c.rope_theta, a)
            case "scores":
                return products.scores(y, x, other[0], c.query_scale, a)
            case "softmax":
                return sums.softmax(y, x, self.allowed, a)
            case "mix":
                return products.mix(y, x, other[0], self.allowed.sum(axis=-1), a)
            case "added":
                return elementwise.added(y, x, other[0], row.name, a)
            case "gelu":
                return elementwise.gelu(y, x, a)
            case "gated":
                return elementwise.gated(y, x, other[0], a)
        raise NotImplementedError(f"{row.kind!r} has no bound")
