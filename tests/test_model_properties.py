"""What holds for any model of this kind, whatever the right numbers are: chunks, batches, time and padding.

Both sides of each comparison are ours, each within its bound of the truth: so they are within twice that of each other.
Where the batch is not the one a float32 bound was taken on, it has the same weights and fewer tokens (measured: at most
half of what is allowed).
"""

from itertools import pairwise

import numpy as np
import pytest

from refgemma.cache import KVCache
from refgemma.numerics import FLOAT32, FLOAT64
from tests.judge import FLOAT64_BOUND, error, float32_bounds, model_of, ours_of, run
from tests.models import random_model
from tests.truth import truth_logits

OPERATIONS = ("run",)
pytestmark = pytest.mark.usefixtures("on_each_library")


def apart(seed, numerics):
    """How far two computations of the same logits may be from each other."""
    return 2 * (FLOAT64_BOUND if numerics is FLOAT64 else float32_bounds()[seed])


def in_chunks(model, split, *, numerics, positions=None):
    """Logits of a batch fed through a cache, cut at the columns named in `split`."""
    positions = model.positions if positions is None else positions
    cache = KVCache(model.config, batch=len(model.tokens), capacity=split[-1], dtype=numerics.dtype)
    chunks = []
    for start, end in pairwise(split):
        part = {"tokens": model.tokens[:, start:end], "positions": positions[:, start:end]}
        chunks.append(run(model, numerics=numerics, cache=cache, **part))
    return np.concatenate(chunks, axis=1)


@pytest.mark.parametrize("numerics", [FLOAT32, FLOAT64], ids=lambda numerics: numerics.name)
@pytest.mark.parametrize("seed", range(9))
def test_cached_is_uncached_for_every_split(seed, numerics):
    """A prompt fed in two chunks, cut anywhere, or in three, or token by token, scores as in one piece."""
    model = random_model(seed, num_tokens=12)
    bound = apart(seed, numerics)
    whole = run(model, numerics=numerics)
    for split in [(0, cut, 12) for cut in range(1, 12)] + [(0, 5, 6, 12), tuple(range(13))]:
        assert error(in_chunks(model, split, numerics=numerics), whole) <= bound, split

    # It can fail: a second chunk that counts from 0 again (D9) is another text.
    restarted = model.positions.copy()
    restarted[:, 5:] -= restarted[:, 5:].min(axis=1, keepdims=True, where=model.real[:, 5:], initial=2**30)
    restarted[~model.real] = -1
    wrong = in_chunks(model, (0, 5, 12), numerics=numerics, positions=restarted)
    assert error(wrong[:, :5], whole[:, :5]) <= bound
    assert error(wrong, whole) > bound


def test_positions_count_on_by_default():
    """Without positions each row counts from 0, later from its own last real token, whatever its column."""
    model = random_model(2, num_tokens=12, num_layers=2)
    prompt = np.array([[-1, -1, -1, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, -1, -1], [-1, 40, 41, 42, 43, -1]])
    tokens = np.random.default_rng(2).integers(0, model.config.vocab_size, size=(4, 9))
    positions = np.hstack([prompt, prompt.max(axis=1, keepdims=True) + np.arange(1, 4)])
    want = truth_logits(model.params, model.config, tokens, positions)

    cache = KVCache(model.config, batch=4, capacity=9, dtype=np.float64)
    steps = [run(model, numerics=FLOAT64, tokens=tokens[:, :6], positions=prompt, cache=cache)]
    for part in (slice(6, 7), slice(7, 9)):
        steps.append(run(model, numerics=FLOAT64, tokens=tokens[:, part], positions=None, cache=cache))
    assert error(np.concatenate(steps, axis=1), want) <= FLOAT64_BOUND
    by_column = np.where(positions < 0, -1, np.arange(9))  # it can fail: columns are not positions
    by_column[:, :6] = prompt
    assert error(truth_logits(model.params, model.config, tokens, by_column), want) > 1e-4

    fresh = run(model, numerics=FLOAT64, tokens=tokens, positions=None)
    assert error(fresh, truth_logits(model.params, model.config, tokens)) <= FLOAT64_BOUND


@pytest.mark.parametrize("numerics", [FLOAT32, FLOAT64], ids=lambda numerics: numerics.name)
@pytest.mark.parametrize("seed", range(12))
def test_a_batched_row_is_the_row_alone(seed, numerics):
    model = model_of(seed)
    batched = ours_of(seed, numerics.name)
    bound = np.abs(batched).max() * apart(seed, numerics)
    for b, real in enumerate(model.real):
        row = {"tokens": model.tokens[b : b + 1], "positions": model.positions[b : b + 1]}
        alone = run(model, numerics=numerics, **{name: array[:, real] for name, array in row.items()})[0]
        assert np.abs(alone - batched[b, real]).max() <= bound
        if not real[0]:  # it can fail: padding on the left that is attended to is seen
            attended = run(model, numerics=numerics, **row | {"positions": np.arange(len(real))[None]})[0]
            assert np.abs(attended[real] - batched[b, real]).max() > bound


@pytest.mark.parametrize("seed", range(12))
def test_later_tokens_change_nothing_earlier(seed):
    model = random_model(seed, num_tokens=16)
    whole = run(model, numerics=FLOAT64)
    bound = np.abs(whole).max() * FLOAT64_BOUND
    for t in (1, 7, 15):
        tokens = model.tokens.copy()
        tokens[:, t] = (tokens[:, t] + 1) % model.config.vocab_size
        change = np.abs(run(model, numerics=FLOAT64, tokens=tokens) - whole).max(axis=-1)  # BT
        assert change[:, :t].max() <= bound
        for b in np.flatnonzero(model.real[:, t]):  # it can fail: each real token from t on sees the change
            assert change[b, t:][model.real[b, t:]].min() > 1000 * bound


@pytest.mark.parametrize("seed", range(12))
def test_only_differences_of_positions_matter(seed):
    """Every row moved along by its own distance scores the same."""
    model = random_model(seed, num_tokens=16)
    whole = run(model, numerics=FLOAT64)
    moved_by = np.random.default_rng(seed).integers(1, 6000, size=(len(model.tokens), 1))
    moved = np.where(model.real, model.positions + moved_by, -1)
    # An angle of up to 8000 is rounded by up to 2**-53 * 8000 = 9e-13, in the query and in the key, and a score moves
    # by that times its size. Measured: 1e-13 at most.
    assert error(run(model, numerics=FLOAT64, positions=moved), whole) <= 1e-11
    stretched = np.where(model.real, model.positions * 2, -1)  # it can fail: distances twice as long are seen
    assert error(run(model, numerics=FLOAT64, positions=stretched), whole) > 1e-4


@pytest.mark.parametrize("numerics", [FLOAT32, FLOAT64], ids=lambda numerics: numerics.name)
@pytest.mark.parametrize("seed", range(9))
def test_padding_scores_zero_and_is_never_seen(seed, numerics):
    model = random_model(seed, num_tokens=16)
    tokens = np.pad(model.tokens, ((0, 1), (2, 3)), constant_values=1)  # more padding, and a row of nothing else
    positions = np.pad(model.positions, ((0, 1), (2, 3)), constant_values=-1)
    logits = run(model, numerics=numerics, tokens=tokens, positions=positions)
    assert logits.dtype == numerics.dtype
    assert np.all(logits[positions < 0] == 0)
    assert np.all(np.abs(logits[positions >= 0]).max(axis=-1) > 0)
    other = np.where(positions < 0, 7, tokens)  # what stands at padding changes no bit
    assert np.array_equal(run(model, numerics=numerics, tokens=other, positions=positions), logits)


@pytest.mark.parametrize("seed", range(12))
def test_last_is_the_last_real_position_of_each_row(seed):
    model = random_model(seed, num_tokens=16)
    tokens = np.pad(model.tokens, ((0, 1), (0, 0)))
    positions = np.pad(model.positions, ((0, 1), (0, 0)), constant_values=-1)  # a last row that is all padding
    every = run(model, numerics=FLOAT64, tokens=tokens, positions=positions)
    last = run(model, numerics=FLOAT64, tokens=tokens, positions=positions, logits="last")
    assert last.shape == (len(tokens), model.config.vocab_size)
    assert np.all(last[-1] == 0)
    ends = [np.flatnonzero(real)[-1] for real in model.real]
    assert error(last[:-1], every[np.arange(len(ends)), ends]) <= FLOAT64_BOUND
