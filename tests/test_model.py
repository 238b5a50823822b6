"""The whole forward pass against the truth written by hand, on random models, with every known bug rejected."""

import numpy as np
import pytest

from refgemma.cache import KVCache
from refgemma.numerics import FLOAT32, FLOAT64, Bfloat16Matrix, from_bfloat16, to_bfloat16
from refgemma.ops.linear import Adapted, Delta
from tests.judge import FLOAT64_BOUND, MODELS, error, float32_bounds, model_of, ours_of, run, truth_of
from tests.models import map_params, random_model, widened
from tests.truth import BUGS, truth_logits

OPERATIONS = ("run",)

KINDS = ("K = 1", "K = N", "1 < K < N")  # the kind of random model `seed` is seed % 3


def test_random_models_reveal():
    models = [model_of(seed) for seed in range(MODELS)]
    for seed, model in enumerate(models):
        c, logits = model.config, truth_of(seed)[model.real]
        assert logits.max() - logits.min() > 10
        assert c.layers[0].head_dim * c.layers[0].num_heads != c.hidden_size
        assert (
            c.layers[0].num_kv_heads == 1,
            c.layers[0].num_kv_heads == c.layers[0].num_heads,
            1 < c.layers[0].num_kv_heads < c.layers[0].num_heads,
        )[seed % 3]
        assert 24 <= c.hidden_size <= 200
        assert 8 <= c.layers[0].head_dim <= 64
        assert model.tokens.shape[1] <= 64
    assert {model.config.num_layers for model in models} == {1, 2, 3, 4}
    assert {model.tokens.shape[0] for model in models} == {1, 2, 3, 4}
    assert sum(not model.real.all() for model in models) > MODELS // 2


@pytest.mark.parametrize("kind", range(3), ids=KINDS)
def test_float64_is_the_truth(kind):
    errors = {seed: error(ours_of(seed, "float64"), truth_of(seed)) for seed in range(kind, MODELS, 3)}
    assert max(errors.values()) <= FLOAT64_BOUND, errors


@pytest.mark.parametrize("kind", range(3), ids=KINDS)
def test_float32_errors_are_at_most_twice_those_of_transformers(kind):
    shares = {
        seed: error(ours_of(seed, "float32"), truth_of(seed)) / float32_bounds()[seed]
        for seed in range(kind, MODELS, 3)
    }
    assert max(shares.values()) <= 1, shares


@pytest.mark.parametrize("bug", sorted(set(BUGS) - {"A5"}))
def test_known_bugs_are_rejected(bug):
    """Each planted bug moves the logits beyond both bounds, in every one of six models in which it acts."""
    acting = [seed for seed in range(48) if acts(bug, model_of(seed))][:6]
    assert len(acting) == 6
    for seed in acting:
        model = model_of(seed)
        wrong = truth_logits(model.params, model.config, model.tokens, model.positions, bugs={bug})
        assert error(wrong, ours_of(seed, "float64")) > 1000 * FLOAT64_BOUND
        assert error(wrong, ours_of(seed, "float32")) > float32_bounds()[seed]


def acts(bug, model):
    """Whether a bug changes anything in this model and batch, by its nature."""
    c, real = model.config, model.real
    if bug == "E6":
        return 1 < c.layers[0].num_kv_heads < c.layers[0].num_heads
    if bug == "D2":
        return model.positions.max() > 256 and model.tokens.shape[1] > 4
    if bug == "D9":
        return bool(np.any((real.sum(axis=1) > 4) & ~real.all(axis=1)))
    if bug.startswith("B9"):  # only a quiet token shows eps
        mean_square = np.square(model.params["embed"] * c.hidden_size**0.5).mean(axis=-1)
        return bool(np.any(mean_square[model.tokens[real]] < 1e-4))
    return True


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.usefixtures("on_each_library")
def test_a_delta_of_the_embedding_is_scaled_and_leaves_the_head_alone(seed):
    model = model_of(seed)
    rng = np.random.default_rng(seed)
    V, D, R = model.config.vocab_size, model.config.hidden_size, 3
    a = rng.normal(size=(R, V)).astype(np.float32)  # PEFT's order: from the token to the stream
    b = (rng.normal(size=(D, R)) / D**0.5).astype(np.float32)
    delta = 0.5 * (b.astype(np.float64) @ a.astype(np.float64)).T  # VD
    adapted = model.params | {"embed": Adapted(model.params["embed"], (Delta(a=a, b=b, scale=0.5),))}
    batch = (model.params, model.config, model.tokens, model.positions)
    got = run(model, numerics=FLOAT32, params=adapted)
    # Twice the bound of the base model: the delta is about as large as the table, so the sum has the roundings of both.
    assert error(got, truth_logits(*batch, embed_delta=delta)) <= 2 * float32_bounds()[seed]
    assert error(got, truth_logits(*batch, embed_delta=delta, bugs={"A5"})) > 2 * float32_bounds()[seed]
    leaked = {"head": model.params["head"] + delta}
    assert error(got, truth_logits(model.params | leaked, *batch[1:], embed_delta=delta)) > 2 * float32_bounds()[seed]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.usefixtures("on_each_library")
def test_an_untied_head_is_used(seed):
    model = model_of(seed)
    head = np.random.default_rng(seed).normal(size=model.params["head"].shape)
    untied = widened(model.params | {"head": head})
    want = truth_logits(untied, model.config, model.tokens, model.positions)
    assert error(run(model, numerics=FLOAT64, params=untied), want) <= FLOAT64_BOUND
    assert error(ours_of(seed, "float64"), want) > 1e-3  # the tied one is seen to be another


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.usefixtures("on_each_library")
def test_matrices_may_stay_in_bfloat16(seed):
    """Stored bits compute like the numbers they stand for, whatever the parity of the widths."""
    model = model_of(seed)
    bits = map_params(lambda w: Bfloat16Matrix(to_bfloat16(w)) if w.ndim == 2 else w, model.params)
    numbers = map_params(lambda w: from_bfloat16(to_bfloat16(w)) if w.ndim == 2 else w, model.params)
    want = truth_logits(numbers, model.config, model.tokens, model.positions)
    # The bound was taken on weights that differ by at most 2**-8 of themselves: as many roundings, of the same size.
    assert error(run(model, numerics=FLOAT32, params=bits), want) <= float32_bounds()[seed]
    wide_norms = map_params(lambda w: w if isinstance(w, Bfloat16Matrix) else w.astype(np.float64), bits)
    assert error(run(model, numerics=FLOAT64, params=wide_norms), want) <= FLOAT64_BOUND
    assert error(ours_of(seed, "float64"), want) > 1e-4  # the narrowing of the weights itself is seen


@pytest.mark.parametrize(
    ("change", "part_of_message"),
    [
        ({"tokens": np.zeros(3, dtype=int)}, "(3,)"),
        ({"tokens": np.zeros((1, 3))}, "float64"),
        ({"tokens": np.array([[0, 1, 10**6]])}, "1000000"),
        ({"tokens": np.array([[0, -1, 1]])}, "-1"),
        ({"positions": np.zeros((1, 2), dtype=int)}, "(1, 2)"),
        ({"positions": np.array([[0, 1, -2]])}, "-2"),
        ({"logits": "first"}, "first"),
        ({"cache": (1, 2)}, "2"),  # two slots for three tokens
        ({"cache": (4, 9)}, "4"),  # four rows for one
    ],
    ids=str,
)
@pytest.mark.usefixtures("on_each_library")
def test_bad_input_is_one_clear_sentence(change, part_of_message):
    model = random_model(0, num_tokens=3)
    if "cache" in change:
        batch, capacity = change["cache"]
        change = {"cache": KVCache(model.config, batch=batch, capacity=capacity, dtype=np.float32)}
    given = {"tokens": np.array([[1, 2, 3]]), "positions": np.array([[0, 1, 2]])} | change
    with pytest.raises((ValueError, TypeError)) as caught:
        run(model, numerics=FLOAT32, **given)
    assert part_of_message in str(caught.value)
    assert "\n" not in str(caught.value)
