"""Adapters of several rows in one batch: each row computes as with its own adapter alone."""

import numpy as np
import pytest

from refgemma.lora.attach import attach, for_rows
from refgemma.lora.fit import Replaced
from refgemma.model import forward
from refgemma.numerics import FLOAT64
from refgemma.ops.linear import Adapted
from tests.lora.test_attach import CLOSE, in_float64, low_rank, model


def logits(params, m, tokens):
    return forward(params, m.config, tokens, numerics=FLOAT64)


@pytest.fixture
def trees():
    """A model, which may have an adapter itself, and two adapters on top: they share a weight, and the embedding."""
    m = model()
    plain = in_float64(m.params)
    bases = {"plain": plain, "adapted": attach(plain, [low_rank(m, "layers.0.attn.q", seed=1)], dtype=np.float64)}
    changes = (
        [low_rank(m, "layers.0.attn.q", seed=2), low_rank(m, "embed", seed=3)],
        [low_rank(m, "layers.0.attn.q", seed=4, magnitude=True), low_rank(m, "layers.1.mlp.down", seed=5, bias=True)],
    )
    return m, {
        name: (base, *(attach(base, change, dtype=np.float64) for change in changes)) for name, base in bases.items()
    }


@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_each_row_computes_as_with_its_own_adapter(trees, kind):
    m, kinds = trees
    base, one, other = kinds[kind]
    own = [other, base, one, other]
    tokens = np.random.default_rng(1).integers(0, m.config.vocab_size, size=(4, 7))
    got = logits(for_rows(base, own), m, tokens)
    for row, tree in enumerate(own):
        want = logits(tree, m, tokens[row : row + 1])[0]
        assert np.abs(got[row] - want).max() <= CLOSE * np.abs(want).max()
        for wrong in (base, one, other):  # it can fail: every adapter shows
            if wrong is not tree:
                far = logits(wrong, m, tokens[row : row + 1])[0]
                assert np.abs(got[row] - far).max() > 1e-3 * np.abs(want).max()


def test_nothing_is_copied(trees):
    _, kinds = trees
    base, one, other = kinds["plain"]
    assert for_rows(base, [one, one]) is one
    assert for_rows(base, [base]) is base
    mixed = for_rows(base, [one, base, other])
    q = mixed["layers"][0]["attn"]["q"]
    assert isinstance(q, Adapted)
    assert q.base is base["layers"][0]["attn"]["q"]
    assert [delta.rows.tolist() for delta in q.deltas] == [[True, False, False], [False, False, True]]
    assert q.deltas[0].a is one["layers"][0]["attn"]["q"].deltas[0].a
    assert mixed["layers"][1]["attn"]["q"] is base["layers"][1]["attn"]["q"]
    assert mixed["head"] is base["head"]


def test_a_weight_trained_whole_is_one_clear_sentence(trees):
    _, kinds = trees
    base, one, _ = kinds["plain"]
    whole = attach(base, [Replaced("layers.1.attn.q", base["layers"][1]["attn"]["q"] * 2)], dtype=np.float64)
    for own in ([whole, base], [one, whole]):
        with pytest.raises(ValueError, match=r"^an adapter holds layers\.1\.attn\.q trained whole: it cannot share"):
            for_rows(base, own)
    assert for_rows(base, [whole, whole]) is whole
