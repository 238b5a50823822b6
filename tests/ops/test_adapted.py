"""Weights with low-rank deltas against the formula by hand: scale, rows of the batch, gain, several at once."""

import numpy as np
import pytest

from refgemma.numerics import FLOAT32, FLOAT64, Numerics, from_bfloat16, to_bfloat16
from refgemma.ops.linear import Adapted, Delta, linear, table_rows
from tests.ops.weights import KINDS, normal, unit, values, weight


def adapted_by_hand(x, w):
    """``y + sum_j rows_j ((y + s_j (x A_j^T) B_j^T) g_j - y)`` in float64, and the sizes of its terms."""
    wide = x.astype(np.float64)
    y, size = wide @ values(w.base).astype(np.float64).T, np.abs(wide) @ np.abs(values(w.base)).astype(np.float64).T
    return with_deltas_by_hand(w, y, size, lambda d: (wide @ d.a.T.astype(np.float64), np.abs(wide) @ np.abs(d.a).T))


def with_deltas_by_hand(w, y, size, first_factor):
    total, total_size = y.copy(), size.copy()
    for delta in w.deltas:
        rows = np.ones(len(y), bool) if delta.rows is None else delta.rows
        gain = 1.0 if delta.gain is None else delta.gain.astype(np.float64)
        low, low_size = first_factor(delta)
        changed = (y + delta.scale * low @ delta.b.T) * gain
        changed_size = (size + abs(delta.scale) * low_size @ np.abs(delta.b).T) * (1 + np.abs(gain))
        total[rows] += (changed - y)[rows]
        total_size[rows] += changed_size[rows]
    return total, total_size


def bound(w, dtype):
    """Relative error of a term: I roundings in the base, I + R in a delta, four for scale, sum, gain and difference."""
    I, R = w.shape[1], max(len(delta.a) for delta in w.deltas)
    roundings = I + R + 4 + len(w.deltas) + 1  # the sum over deltas, and one for the second order
    return roundings * (unit(dtype) + unit(np.float64))  # the formula by hand is in float64 itself


def deltas(rng, O, I, B, dtype=np.float32):
    """Three at once: plain, for some rows of the batch, and with a gain."""
    some = np.arange(B) % 2 == 1
    return (
        Delta(a=normal(rng, 2, I, dtype=dtype), b=normal(rng, O, 2, dtype=dtype), scale=0.5),
        Delta(a=normal(rng, 3, I, dtype=dtype), b=normal(rng, O, 3, dtype=dtype), scale=-2.0, rows=some),
        Delta(
            a=normal(rng, 1, I, dtype=dtype),
            b=normal(rng, O, 1, dtype=dtype),
            scale=0.25,
            rows=~some,
            gain=np.exp(normal(rng, O, dtype=dtype)),
        ),
        Delta(
            a=normal(rng, 4, I, dtype=dtype),
            b=normal(rng, O, 4, dtype=dtype),
            scale=1.0,
            gain=np.exp(normal(rng, O, dtype=dtype)),
        ),
    )


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.usefixtures("tiny_tiles")
def test_adapted_is_the_base_plus_its_deltas(kind, dtype, count):
    rng = np.random.default_rng([12, count])
    x, base = normal(rng, 3, 2, 7, dtype=dtype), weight(rng, 9, 7, kind)
    for few in (deltas(rng, 9, 7, 3)[:count], deltas(rng, 9, 7, 3)[-count:]):
        w = Adapted(base, few)
        assert w.shape == (9, 7)
        got = linear(x, w)
        want, size = adapted_by_hand(x, w)
        assert got.dtype == dtype
        assert np.all(np.abs(got - want) <= bound(w, dtype) * size)


def test_adapted_rejects_the_usual_mistakes():
    rng = np.random.default_rng(13)
    x, base = normal(rng, 3, 2, 7), weight(rng, 9, 7, "bfloat16")
    plain, some, _, gained = deltas(rng, 9, 7, 3)
    w = Adapted(base, (plain, some, gained))
    want, size = adapted_by_hand(x, w)

    def seen(*wrong):
        return np.any(np.abs(linear(x, Adapted(base, wrong)) - want) > bound(w, np.float32) * size)

    def copy(delta, **changes):
        return Delta(
            **{"a": delta.a, "b": delta.b, "scale": delta.scale, "rows": delta.rows, "gain": delta.gain} | changes
        )

    assert not seen(plain, some, gained)
    assert seen(plain, some)
    assert seen(copy(plain, scale=1.0), some, gained)
    assert seen(copy(plain, scale=plain.scale * 2**0.5), some, gained)  # alpha over the root of the rank
    assert seen(plain, copy(some, rows=None), gained)
    assert seen(plain, copy(some, rows=~some.rows), gained)
    assert seen(plain, some, copy(gained, gain=None))
    folded = copy(gained, b=gained.b * gained.gain[:, None], gain=None)  # the gain on the delta, not on the base
    assert seen(plain, some, folded)
    in_turn = linear(x, Adapted(base, (plain, some))).astype(
        np.float64
    )  # DoRA scales what earlier adapters changed, too
    in_turn = (in_turn + gained.scale * x @ gained.a.T @ gained.b.T) * gained.gain
    assert np.any(np.abs(in_turn - want) > bound(w, np.float32) * size)


def test_rows_without_a_delta_are_the_bare_base():
    """To the bit: nobody's adapter touches another row."""
    rng = np.random.default_rng(14)
    x, base = normal(rng, 3, 2, 7), weight(rng, 9, 7, "bfloat16")
    only_second = Adapted(base, (Delta(a=normal(rng, 2, 7), b=normal(rng, 9, 2), scale=1.0, rows=np.arange(3) == 1),))
    got, bare = linear(x, only_second), linear(x, base)
    assert np.array_equal(got[[0, 2]], bare[[0, 2]])
    assert not np.array_equal(got[1], bare[1])
    nobody = Adapted(base, (Delta(a=normal(rng, 2, 7), b=normal(rng, 9, 2), scale=1.0, rows=np.zeros(3, bool)),))
    assert np.array_equal(linear(x, nobody), bare)


# ---- rows of a table


@pytest.mark.parametrize("numerics", [FLOAT32, FLOAT64], ids=lambda n: n.name)
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_table_rows_are_exact(kind, numerics):
    rng = np.random.default_rng(15)
    table, tokens = weight(rng, 11, 5, kind), rng.integers(0, 11, size=(2, 4))
    rows = table_rows(tokens, table, numerics)
    assert rows.dtype == numerics.dtype
    assert np.array_equal(rows, values(table)[tokens])
    rows[:] = 0  # a copy
    assert np.any(values(table) != 0)


@pytest.mark.parametrize("numerics", [FLOAT32, FLOAT64], ids=lambda n: n.name)
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_table_rows_of_an_adapted_table(kind, numerics):
    rng = np.random.default_rng(16)
    V, D = 11, 5
    tokens = rng.integers(0, V, size=(3, 4))
    table = Adapted(weight(rng, V, D, kind), deltas(rng, D, V, 3))  # a is (R, V), b is (D, R)
    got = table_rows(tokens, table, numerics)
    y = values(table.base)[tokens].astype(np.float64)
    want, size = with_deltas_by_hand(
        table, y, np.abs(y), lambda d: (d.a.T[tokens].astype(np.float64), np.abs(d.a.T[tokens]))
    )
    assert got.dtype == numerics.dtype
    # As in `bound`, but a lookup rounds nothing: R = 4 roundings in a delta, four more, the sum, and one.
    within = (4 + 4 + len(table.deltas) + 1) * (unit(numerics.dtype) + unit(np.float64))
    assert np.all(np.abs(got - want) <= within * size)
    assert np.any(np.abs(table_rows(tokens, table.base, numerics) - want) > within * size)  # the delta left out is seen


# ---- rounding


def test_results_are_rounded_where_the_profile_says():
    rng = np.random.default_rng(17)
    rounded = Numerics("test", np.dtype(np.float32), {"linear": "bfloat16"})
    x, base = normal(rng, 2, 3, 8), weight(rng, 5, 8, "bfloat16")
    plain = linear(x, base)
    got = linear(x, base, numerics=rounded)
    assert got.dtype == np.float32
    assert np.array_equal(got, from_bfloat16(to_bfloat16(plain)))
    assert not np.array_equal(got, plain)
    # Of an adapted weight each of the three products is rounded, as each is a layer of its own in other engines.
    delta = Delta(a=normal(rng, 2, 8), b=normal(rng, 5, 2), scale=0.5)
    by_hand = got + linear(linear(x, delta.a, numerics=rounded), delta.b, numerics=rounded) * np.float32(0.5)
    assert np.array_equal(linear(x, Adapted(base, (delta,)), numerics=rounded), by_hand)
