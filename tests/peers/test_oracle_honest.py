"""Honest runs of transformers, judged: float32 and bfloat16, eager and sdpa, in one call and through the cache.

`pytest -m peers tests/peers/test_oracle_honest.py -s` prints the largest ratio of each operation in each arithmetic.
"""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from refgemma.oracle.formula_models import formula
from refgemma.oracle.judging.forced import judge_forced
from refgemma.oracle.judging.free_run import judge_free
from refgemma.oracle.operations import split_name
from refgemma.oracle.thresholds import LIBRARY
from tests.bfloat16 import narrow_params
from tests.models import random_model

pytestmark = pytest.mark.peers

MODELS = 200
WAYS = (("sdpa", 1), ("eager", 4), ("sdpa", 3))  # and ("eager", 1) for every model


@pytest.fixture(scope="module")
def honest():
    """Our recorder of transformers' runs."""
    pytest.importorskip("torch", reason="needs torch: pip install refgemma[peers]")
    pytest.importorskip("transformers", reason="needs transformers: pip install refgemma[peers]")
    from tests.peers import honest

    return honest


@pytest.fixture(scope="module")
def runs(honest):
    """(model, arithmetic, attention, trace) of 200 random models, four runs each."""

    def all_of_them():
        for seed in range(MODELS):
            model = random_model(seed)
            for dtype in ("float32", "bfloat16"):
                here = model if dtype == "float32" else replace(model, params=narrow_params(model.params))
                for attention, steps in (("eager", 1), WAYS[seed % len(WAYS)]):
                    threads = (1, 2, 4)[seed // len(WAYS) % 3]
                    yield here, dtype, attention, honest.honest_trace(here, dtype, attention, steps, threads)

    return all_of_them


def test_no_honest_run_is_called_wrong(runs):
    worst, likely, grades = defaultdict(float), defaultdict(float), Counter()
    for model, dtype, attention, theirs in runs():
        for finding in judge_forced(model.params, model.config, theirs, dtype):
            grades[finding.grade] += 1
            assert finding.ok, (model.seed, dtype, attention, finding)
            if finding.grade != "not given":
                key = split_name(finding.name)[1], dtype, attention
                worst[key] = max(worst[key], finding.ratio)
                likely[key] = max(likely[key], finding.likely)
    ways = [(dtype, attention) for dtype in ("float32", "bfloat16") for attention in ("eager", "sdpa")]
    print(
        "\nlargest error / worst case, and / what chance explains\n"
        + " " * 14
        + "".join(f"{d} {a:10}" for d, a in ways)
    )
    for kind in dict.fromkeys(kind for kind, *_ in worst):
        cells = [(kind, *way) for way in ways]
        print(f"{kind:14}" + "".join(f"{worst[c]:8.3f} {likely[c]:5.3f}   " if c in worst else 17 * " " for c in cells))
    print(dict(grades))
    # Chance beyond its bound: once in a million tensors, of which there are some 40,000 here.
    assert grades["suspicious"] == 0
    # Neither loose by orders of magnitude: every operation comes within a factor of 10 of what chance explains; those
    # of one rounding reach it.
    assert min(likely.values()) > 0.1
    for kind in ("attn.residual", "mlp.gated", "out"):
        assert likely[kind, "float32", "eager"] > 0.99
    for kind in ("attn.norm", "attn.q", "attn.mix", "mlp.down", "logits"):
        assert likely[kind, "bfloat16", "eager"] > 0.98


def test_no_honest_run_is_outside_the_free_running_budget(honest):
    """Final logits alone; how much room there is."""
    shares = defaultdict(list)
    for seed in range(MODELS):
        model = random_model(seed)
        dtype = ("float32", "bfloat16")[seed % 2]
        if dtype == "bfloat16":
            model = replace(model, params=narrow_params(model.params))
        theirs = honest.honest_trace(model, dtype, ("eager", "sdpa")[seed // 2 % 2], (1, 3)[seed // 4 % 2])
        found = judge_free(model.params, model.config, theirs.tensors["logits"], model.tokens, model.positions, dtype)
        shares[dtype].append(found.likely)
        assert found.grade == "inside rounding", (seed, dtype, found)
    for dtype, share in shares.items():
        print(f"\n{dtype}: error / budget of chance: median {np.median(share):.2f}, largest {max(share):.2f}")
        assert 0.05 < np.median(share) < 0.5  # the budget is some times what rounding does, not orders of magnitude


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_formula_models_run_honestly(honest, dtype):
    """Among them positions beyond 131,000, where float32 angles are off by 0.01 (D3)."""
    for model in formula.MODELS:
        if model.rank:
            continue  # transformers alone has no adapters
        model = as_random_model(model)
        findings = judge_forced(model.params, model.config, honest.honest_trace(model, dtype), dtype)
        assert {finding.grade for finding in findings} == {"inside rounding"}


def test_float16(honest):
    for seed in range(12):
        model = random_model(seed, num_tokens=24)
        model = replace(model, params=half(model.params))
        findings = judge_forced(model.params, model.config, honest.honest_trace(model, "float16"), "float16")
        assert {finding.grade for finding in findings} == {"inside rounding"}, seed
        assert max(f.likely for f in findings if f.name.endswith("mlp.norm")) > 0.8
        found = judge_forced(model.params, model.config, honest.honest_trace(model, "bfloat16"), "float16")
        assert any(f.grade == "wrong" for f in found)


def test_tiny_it_runs_honestly(honest):
    from refgemma import load
    from tests.peers.planted import peer_of

    gemma = load("tiny-it")
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, gemma.config.vocab_size, size=(2, 48))
    tokens[:, 0] = 2
    model = replace(random_model(0), config=gemma.config, params=plain(gemma.params), tokens=tokens)
    model = replace(model, positions=np.tile(np.arange(48), (2, 1)))
    for dtype in ("float32", "bfloat16"):
        for attention in ("eager", "sdpa"):
            peer = peer_of(model, honest.DTYPES[dtype], attention)
            theirs = honest.honest_trace(model, dtype, attention, peer=peer)
            for finding in judge_forced(gemma.params, gemma.config, theirs, dtype):
                assert finding.grade in ("inside rounding", "not given"), finding


def test_torch_s_curves_are_within_the_allowance_for_libraries(honest):
    import torch

    rng = np.random.default_rng(5)
    worst = {}
    for name, low, high in (("exp", -87, 0), ("tanh", -9, 9), ("cos", 0, 8192), ("sin", 0, 131072)):
        x = rng.uniform(low, high, size=1_000_000).astype(np.float32)
        exact = getattr(np, name)(x.astype(np.float64))
        got = getattr(torch, name)(torch.from_numpy(x)).numpy().astype(np.float64)
        worst[name] = np.max(np.abs(got - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64))
    print(f"\ntorch, units in the last place: { ({k: round(float(v), 2) for k, v in worst.items()}) }")
    assert max(worst.values()) <= LIBRARY


def as_random_model(model):
    """Formula model with the fields that the recorder looks at."""
    own = {"config": model.config, "params": model.params, "tokens": model.tokens, "positions": model.positions}
    return replace(random_model(0), **own)


def plain(params):
    """Params as float32 arrays."""
    from refgemma.numerics import Bfloat16Matrix, from_bfloat16
    from tests.models import map_params

    return map_params(lambda w: from_bfloat16(w.bits) if isinstance(w, Bfloat16Matrix) else np.asarray(w), params)


def half(params):
    from tests.models import map_params

    return map_params(lambda w: w.astype(np.float16).astype(np.float32), params)
