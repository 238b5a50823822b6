"""What a cache holds, shows and refuses; that cached runs equal uncached ones is tested with the model."""

import numpy as np
import pytest

from refgemma import cache as cache_module
from refgemma.cache import KVCache, join_rows
from tests.models import random_model

CONFIG = random_model(
    2, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, hidden_size=30, intermediate_size=31
).config
L, K, H = 2, 2, 6


def filled(*rows, capacity=6, dtype=np.float32):
    """A cache that was fed rows at these positions, all in one call, with numbers that tell layer, row and slot."""
    positions = np.array(rows)
    cache = KVCache(CONFIG, batch=len(rows), capacity=capacity, dtype=dtype)
    feed(cache, positions)
    return cache


def feed(cache, positions):
    cache.extend(positions)
    for layer in range(L):
        k, v = tensors(layer, positions)
        cache.update(layer, k.astype(cache.dtype), v.astype(cache.dtype))


def tensors(layer, positions):
    """Keys and values (B, T, K, H), every number different."""
    shape = (*positions.shape, K, H)
    k = 1000.0 * layer + 10.0 * positions[..., None, None] + np.arange(K * H).reshape(K, H) / 16 + np.zeros(shape)
    return k, -k - 0.5


# ---- what it holds


def test_update_lays_keys_and_values_out_by_head():
    positions = np.array([[0, 1, 2], [-1, 0, 1]])
    cache = KVCache(CONFIG, batch=2, capacity=5, dtype=np.float64)
    cache.extend(positions)
    for layer in range(L):
        k, v = tensors(layer, positions)
        keys, values = cache.update(layer, k, v)
        assert keys.shape == values.shape == (2, K, 3, H)
        assert np.array_equal(keys, k.transpose(0, 2, 1, 3))
        assert np.array_equal(values, v.transpose(0, 2, 1, 3))
        assert not np.array_equal(keys, k.reshape(2, K, 3, H))  # it can fail: heads and slots are not confused
        assert np.shares_memory(keys, cache.keys[layer])
    later = np.array([[3], [2]])
    cache.extend(later)
    keys, _ = cache.update(1, *tensors(1, later))
    every = np.concatenate([positions, later], axis=1)
    assert np.array_equal(keys, tensors(1, every)[0].transpose(0, 2, 1, 3))
    assert np.array_equal(cache.positions, [[0, 1, 2, 3, -1], [-1, 0, 1, 2, -1]])
    assert cache.length == 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype(dtype):
    assert filled([0, 1], dtype=dtype).dtype == dtype


def test_next_positions_count_on_from_the_last_real_one_of_each_row():
    cache = KVCache(CONFIG, batch=4, capacity=6)
    assert cache.next_positions(2).tolist() == [[0, 1]] * 4
    feed(cache, np.array([[0, 1, 2], [-1, -1, 0], [5, 6, -1], [-1, -1, -1]]))
    assert cache.next_positions(2).tolist() == [[3, 4], [1, 2], [7, 8], [0, 1]]
    assert cache.next_positions(1).tolist() == [[3], [1], [7], [0]]
    feed(cache, cache.next_positions(1))
    assert cache.next_positions(1).tolist() == [[4], [2], [8], [1]]


# ---- side by side


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_of_several_caches_end_together_in_a_new_one(monkeypatch, dtype):
    one = filled([0, 1, 2, 3], [-1, -1, 0, 1], [-1, 0, -1, 1], dtype=dtype)
    other = filled([5, 6, 7], capacity=3, dtype=dtype)
    kept = [np.stack(arrays) for cache in (one, other) for arrays in (cache.keys, cache.values)]
    # Slots that nothing has been written to may hold anything, even NaN, which no weight of zero silences.
    monkeypatch.setattr(cache_module.np, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype))
    batch = join_rows([(other, 0), (one, 1), (one, 2)], CONFIG, capacity=5)
    monkeypatch.undo()
    assert np.stack(batch.keys).shape == (L, 3, K, 5, H)
    assert batch.dtype == dtype
    assert batch.length == 3  # slot 0 of the first cache is of no use to these rows
    assert batch.positions.tolist() == [[5, 6, 7, -1, -1], [-1, 0, 1, -1, -1], [0, -1, 1, -1, -1]]
    for new, theirs, ours in (
        (0, np.stack(other.keys)[:, 0], [0, 1, 2]),
        (1, np.stack(one.keys)[:, 1], [2, 3]),
        (2, np.stack(one.keys)[:, 2], [1, 2, 3]),
    ):
        count = len(ours)
        assert np.array_equal(np.stack(batch.keys)[:, new, :, 3 - count : 3], theirs[:, :, ours])
        assert np.array_equal(
            np.stack(batch.values)[:, new, :, 3 - count : 3], -np.stack(batch.keys)[:, new, :, 3 - count : 3] - 0.5
        )
    assert not np.stack(batch.keys)[:, 1, :, 0].any()
    assert not np.stack(batch.values)[:, 1, :, 0].any()
    feed(batch, np.array([[8], [2], [2]]))
    assert batch.positions[:, 3].tolist() == [8, 2, 2]
    now = [np.stack(arrays) for cache in (one, other) for arrays in (cache.keys, cache.values)]
    filled_slots = [slice(4), slice(4), slice(3), slice(3)]
    for a, b, slots in zip(kept, now, filled_slots, strict=True):
        assert np.array_equal(a[:, :, :, slots], b[:, :, :, slots])


# ---- truncate


def test_truncate_forgets_the_end():
    cache = filled([0, 1, 2, 3], [-1, 0, 1, 2])
    before = np.stack(cache.keys)[:, :, :, :2].copy()
    cache.truncate(2)
    assert cache.length == 2
    assert cache.positions.tolist() == [[0, 1, -1, -1, -1, -1], [-1, 0, -1, -1, -1, -1]]
    assert cache.next_positions(1).tolist() == [[2], [1]]
    feed(cache, np.array([[2], [1]]))
    assert np.array_equal(np.stack(cache.keys)[:, :, :, :2], before)
    assert np.stack(cache.keys)[0, 0, 0, 2, 0] == 20
    cache.truncate(cache.length)
    assert cache.length == 3
    cache.truncate(0)
    assert np.all(cache.positions == -1)


@pytest.mark.parametrize("length", [-1, 3])
def test_truncate_refuses_what_is_not_filled(length):
    cache = filled([0, 1])
    with pytest.raises(ValueError, match=rf"^cannot keep {length} slots: 2 are filled$"):
        cache.truncate(length)
    assert cache.length == 2


# ---- fork


def test_a_fork_begins_alike_and_shares_until_it_is_extended():
    cache = filled([0, 1, 2, 3])
    fork = cache.fork(3, batch=2, capacity=5)
    assert np.shares_memory(fork.keys[0], cache.keys[0])
    assert fork.length == 3
    assert fork.positions.tolist() == [[0, 1, 2, -1, -1]] * 2
    assert "3 of 5 slots filled" in repr(fork)
    before = np.stack(cache.keys).copy(), np.stack(cache.values).copy()
    feed(fork, np.array([[3, 4], [7, -1]]))
    assert not np.shares_memory(fork.keys[0], cache.keys[0])
    assert np.stack(fork.keys).shape == (L, 2, K, 5, H)
    assert np.array_equal(cache.keys, before[0])
    assert np.array_equal(cache.values, before[1])
    want = filled([0, 1, 2, 3, 4], [0, 1, 2, 7, -1], capacity=5)
    assert np.array_equal(fork.keys, want.keys)
    assert np.array_equal(fork.values, want.values)
    assert np.array_equal(fork.positions, want.positions)


def test_a_cache_goes_on_beside_its_forks():
    cache = filled([0, 1, 2])
    fork = cache.fork(2, batch=1, capacity=6)
    feed(cache, np.array([[3]]))
    feed(fork, np.array([[9]]))
    assert np.stack(cache.keys)[0, 0, 0, :4, 0].tolist() == [0, 10, 20, 30]
    assert np.stack(fork.keys)[0, 0, 0, :3, 0].tolist() == [0, 10, 90]


@pytest.mark.parametrize("length", [-1, 5])
def test_a_fork_of_what_is_not_there_is_refused(length):
    with pytest.raises(ValueError, match=rf"^cannot begin a cache of 6 slots with {length} of one that has 1"):
        filled([0, 1, 2, 3]).fork(length, batch=1, capacity=6)
    with pytest.raises(ValueError, match=r"^cannot begin a cache of 2 slots with 3 of one"):
        filled([0, 1, 2, 3]).fork(3, batch=1, capacity=2)
    with pytest.raises(ValueError, match=r"of one that has 2 rows"):
        filled([0], [0]).fork(1, batch=1, capacity=6)


# ---- refusals


def test_overflow_is_one_clear_sentence_and_changes_nothing():
    cache = filled([0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"^the cache has 6 slots, 4 of them filled: no room for 3 more$"):
        cache.extend(np.array([[4, 5, 6]]))
    assert cache.length == 4
    assert cache.positions.tolist() == [[0, 1, 2, 3, -1, -1]]
    cache.extend(np.array([[4, 5]]))  # the last slot is usable
    assert cache.length == 6


def test_another_number_of_rows_is_one_clear_sentence():
    for rows in (1, 3):
        with pytest.raises(ValueError, match=rf"^tokens have {rows} rows, the cache was made for 2$"):
            filled([0], [0]).extend(np.zeros((rows, 1), int))


def test_keys_of_another_dtype_are_refused():
    """Rather than narrowed in silence, as when a float32 cache is handed to a float64 run."""
    cache = KVCache(CONFIG, batch=1, capacity=2)
    cache.extend(np.array([[0]]))
    with pytest.raises(ValueError, match=r"^keys are float64, the cache holds float32"):
        cache.update(0, *tensors(0, np.array([[0]])))


# ---- what it shows


def test_repr_shows_sizes_and_the_positions_of_each_row():
    cache = filled([0, 1, 2, 3], [-1, -1, 0, 1], [-1, -1, -1, -1], [7, 8, 2, -1])
    # A slot is keys and values of 2 layers, 4 rows, 2 heads of 6, 4 bytes each: 768 bytes.
    shown = """\
KVCache: 2 layers x 4 rows x 2 heads x 6, float32
  4 of 6 slots filled, 3,072 of 4,608 bytes
  row 0: 0-3
  row 1: 2 x padding, 0-1
  row 2: 4 x padding
  row 3: 7-8, 2, 1 x padding"""
    assert repr(cache) == shown


def test_repr_of_an_empty_cache():
    shown = """\
KVCache: 2 layers x 1 rows x 2 heads x 6, float64
  0 of 3 slots filled, 0 of 1,152 bytes
  row 0: empty"""
    assert repr(KVCache(CONFIG, batch=1, capacity=3, dtype=np.float64)) == shown


def test_repr_of_a_long_row_stays_short():
    cache = filled([*range(3000)], capacity=4000)
    assert repr(cache).endswith("\n  row 0: 0-2999")
    assert len(repr(cache)) < 200
