"""Profile bf16-deepmind against google-deepmind/gemma's Flax code in bfloat16 on the CPU, live.

Needs ``pip install jax==0.4.38 flax==0.10.2`` and ``pip install --no-deps gemma==2.0.2``, best in a virtual environment
of its own. Without them, the default tests compare with what that code computed once.
"""

from collections import defaultdict

import numpy as np
import pytest

from refgemma.model import forward
from refgemma.numerics import PROFILES
from refgemma.ops.norm import rms_norm
from tests.bfloat16 import allowed, causal, narrow_example, nearest

pytestmark = pytest.mark.peers

PROFILE = PROFILES["bf16-deepmind"]


@pytest.fixture(scope="module")
def recorded():
    """Our recorder of whole models."""
    for library in ("jax", "flax", "gemma.layers"):
        pytest.importorskip(library, reason="needs google-deepmind/gemma: pip install jax flax; --no-deps gemma==2.0.2")
    from tests.peers import recorded_deepmind

    return recorded_deepmind


def test_norm_alone_down_to_where_eps_counts(recorded):
    from gemma import layers
    from jax import numpy as jnp

    rng = np.random.default_rng(0)
    x = nearest(rng.normal(size=(5000, 40)) * 10.0 ** rng.uniform(-4, 2, size=(5000, 1))).astype(np.float32)
    weight = nearest(rng.normal(size=40) * 0.4).astype(np.float32)
    params = {"params": {"scale": jnp.asarray(weight, jnp.bfloat16)}}
    theirs = np.asarray(layers.RMSNorm().apply(params, jnp.asarray(x, jnp.bfloat16)).astype(jnp.float32))

    def share(numerics):
        return np.mean(rms_norm(x, weight, eps=1e-6, numerics=numerics) == theirs)

    print(f"\nnorm: {share(PROFILE):.4%} bit-equal")
    assert share(PROFILE) >= 0.999
    for point in PROFILE.rounding:
        if point.startswith("norm."):
            assert share(PROFILE.without(point)) < 0.98, point


def test_models_forced_operation_by_operation_and_free(recorded):
    equal, total, free = defaultdict(int), defaultdict(int), defaultdict(list)
    for seed in range(12):
        model = narrow_example(seed)
        seen = recorded.record(model.params, model.config, model.tokens, model.positions)

        def tap(name, value, seen=seen, model=model):
            place = (..., causal(value.shape[-1])) if name.endswith("attn.scores") else ...
            same = (value == seen[name])[place]
            equal[name.split(".", 2)[-1]] += np.count_nonzero(same)
            total[name.split(".", 2)[-1]] += same.size
            if not same.all():
                arguments = (seen, model.params, model.config, model.tokens, model.positions)
                for got in (seen[name], value):
                    low, high = allowed("bf16-deepmind", name, *arguments)
                    assert np.all(((low <= got) & (got <= high))[place]), (model.seed, name)
            return seen[name]

        arguments = {"positions": model.positions}
        forward(model.params, model.config, model.tokens, numerics=PROFILE, tap=tap, **arguments)
        for name, profile in PROFILES.items():
            if profile.dtype == np.float32:
                logits = forward(model.params, model.config, model.tokens, numerics=profile, **arguments)
                free[name].append(np.mean(nearest(logits) == seen["logits"]))
    print()
    for kind in total:
        print(f"{kind:14} {equal[kind] / total[kind]:.4%} of {total[kind]:,}")
    for name, shares in free.items():
        print(f"{name}, free: {np.mean(shares):.2%} of logits bit-equal")
    assert len(total) == 21
    assert all(equal[kind] >= 0.99 * total[kind] for kind in total)
    assert max(free, key=lambda name: np.mean(free[name])) == "bf16-deepmind"
