"""Weights with low-rank deltas against the formula by hand: scale, rows of the batch, gain, several at once."""

import tracemalloc

import numpy as np
import pytest

from refgemma.numerics import FLOAT32, FLOAT64, Numerics, from_bfloat16, to_bfloat16
from refgemma.ops.embedding import embed
from refgemma.ops.linear import Adapted, Delta, linear, table_rows
from tests.ops.weights import KINDS, normal, unit, values, weight

OPERATIONS = ("embed", "linear", "table_rows")


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
            gain=np.exp(rng.normal(size=O)),
        ),
        Delta(
            a=normal(rng, 4, I, dtype=dtype),
            b=normal(rng, O, 4, dtype=dtype),
            scale=1.0,
            gain=np.exp(rng.normal(size=O)),
        ),
    )


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.usefixtures("tiny_tiles", "on_each_library")
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


@pytest.mark.usefixtures("on_each_library")
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
    folded = copy(
        gained, b=gained.b * gained.gain[:, None].astype(np.float32), gain=None
    )  # the gain on the delta, not on the base
    assert seen(plain, some, folded)
    in_turn = linear(x, Adapted(base, (plain, some))).astype(
        np.float64
    )  # DoRA scales what earlier adapters changed, too
    in_turn = (in_turn + gained.scale * x @ gained.a.T @ gained.b.T) * gained.gain
    assert np.any(np.abs(in_turn - want) > bound(w, np.float32) * size)


@pytest.mark.usefixtures("on_each_library")
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
@pytest.mark.usefixtures("on_each_library")
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
@pytest.mark.usefixtures("on_each_library")
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


@pytest.mark.usefixtures("on_each_library")
def test_results_are_rounded_where_the_profile_says():
    rng = np.random.default_rng(17)
    rounded = Numerics("test", np.dtype(np.float32), {"linear": "bfloat16"})
    x, base = normal(rng, 2, 3, 8), weight(rng, 5, 8, "bfloat16")
    plain = linear(x, base)
    got = linear(x, base, numerics=rounded)
    assert got.dtype == np.float32
    assert np.array_equal(got, from_bfloat16(to_bfloat16(plain)))
    assert not np.array_equal(got, plain)


def in_bfloat16(x):
    return from_bfloat16(to_bfloat16(x.astype(np.float32)))


def narrow_case(gain):
    rng = np.random.default_rng(18)
    x, base = in_bfloat16(normal(rng, 2, 20, 40)), weight(rng, 50, 40, "bfloat16")
    dora = np.exp(0.3 * rng.normal(size=50)) if gain else None
    return x, Adapted(base, (Delta(a=normal(rng, 4, 40), b=normal(rng, 50, 4), scale=0.5, gain=dora),))


@pytest.mark.parametrize("gain", [False, True], ids=["plain", "DoRA"])
@pytest.mark.usefixtures("on_each_library")
def test_low_rank_products_stay_wide_where_the_base_is_rounded(gain):
    """As PEFT beside a bfloat16 base: its product in bfloat16, all of the delta in float32, and the sum rounded."""
    rounded = Numerics("test", np.dtype(np.float32), {"linear": "bfloat16"})
    x, w = narrow_case(gain)
    (delta,) = w.deltas
    got = linear(x, w, numerics=rounded)
    base = linear(x, w.base, numerics=rounded).astype(np.float64)
    low = x.astype(np.float64) @ delta.a.T.astype(np.float64) @ delta.b.T.astype(np.float64)

    def share(base, low, steps=lambda y: y):
        """Of numbers that come out so; float32 sums move some that lie next to a midpoint, about 1 in 2 ** 14."""
        total = (base + 0.5 * steps(low)) * (1.0 if delta.gain is None else delta.gain)
        return np.mean(in_bfloat16(steps(total)) == got)

    assert share(base, low) >= 0.999
    assert np.array_equal(in_bfloat16(got), got)
    unrounded = x.astype(np.float64) @ values(w.base).T.astype(np.float64)
    assert share(unrounded, low) < 0.95  # the base's product not rounded
    assert share(base, low, in_bfloat16) < 0.95  # the delta's rounded
    narrow = in_bfloat16(in_bfloat16(x @ delta.a.T) @ delta.b.T)
    assert share(base, narrow.astype(np.float64)) < 0.95  # both of its products rounded


@pytest.mark.usefixtures("on_each_library")
def test_a_sum_that_is_not_rounded_is_seen():
    x, w = narrow_case(gain=False)
    rounded = Numerics("test", np.dtype(np.float32), {"linear": "bfloat16"})
    (delta,) = w.deltas
    unfinished = linear(x, w.base, numerics=rounded) + 0.5 * linear(linear(x, delta.a), delta.b)
    assert np.mean(in_bfloat16(unfinished) == unfinished) < 0.1
    assert np.array_equal(linear(x, w, numerics=rounded), in_bfloat16(unfinished))


@pytest.mark.usefixtures("on_each_library")
def test_rows_without_a_delta_are_the_bare_base_where_products_are_rounded():
    rounded = Numerics("test", np.dtype(np.float32), {"linear": "bfloat16"})
    x, w = narrow_case(gain=False)
    some = Adapted(w.base, (Delta(a=w.deltas[0].a, b=w.deltas[0].b, scale=0.5, rows=np.array([False, True])),))
    got = linear(x, some, numerics=rounded)
    assert np.array_equal(got[0], linear(x, w.base, numerics=rounded)[0])
    assert np.array_equal(got[1], linear(x, w, numerics=rounded)[1])


@pytest.mark.parametrize("gain", [False, True], ids=["plain", "DoRA"])
@pytest.mark.usefixtures("on_each_library")
def test_an_adapted_table_is_scaled_and_rounded_like_peft(gain):
    """The rows of the base scaled and rounded, then the scaled delta added, then the sum rounded."""
    rng = np.random.default_rng(19)
    V, D = 30, 40
    profile = Numerics("test", np.dtype(np.float32), {"embed.scale": "bfloat16", "embed": "bfloat16"})
    dora = np.exp(0.3 * rng.normal(size=D)) if gain else None
    delta = Delta(a=normal(rng, 3, V), b=normal(rng, D, 3), scale=0.5, gain=dora)
    table, tokens = weight(rng, V, D, "bfloat16"), rng.integers(V, size=(2, 50))
    got = embed(tokens, Adapted(table, (delta,)), numerics=profile)
    low = 0.5 * delta.a.T[tokens].astype(np.float64) @ delta.b.T.astype(np.float64)
    rows = values(table)[tokens].astype(np.float64)
    narrow_root, root, g = float(in_bfloat16(np.array(D**0.5))), D**0.5, 1.0 if dora is None else dora
    assert narrow_root != root

    def share(total):
        return np.mean(in_bfloat16(total * g) == got)

    assert share(in_bfloat16(rows * narrow_root) + low * narrow_root) >= 0.999
    assert share(in_bfloat16(rows * narrow_root) + low * root) < 0.95
    assert share(in_bfloat16(rows * narrow_root) + in_bfloat16(low * narrow_root)) < 0.95
    assert share((rows + low) * narrow_root) < 0.95
    assert share(in_bfloat16(rows * root) + low * narrow_root) < 0.95


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.usefixtures("on_each_library")
def test_nothing_that_came_in_is_written_to(count):
    """The sum is made in place, where nobody else looks."""
    rng = np.random.default_rng([20, count])
    for kind in ("bfloat16", "float32"):
        x, base = normal(rng, 3, 2, 7), weight(rng, 9, 7, kind)
        few = deltas(rng, 9, 7, 3)[:count]
        before = [x.copy(), values(base).copy(), *(d.a.copy() for d in few), *(d.b.copy() for d in few)]
        first = linear(x, Adapted(base, few))
        assert np.array_equal(linear(x, Adapted(base, few)), first)
        table = Adapted(weight(rng, 7, 9, kind), few)
        kept = values(table.base).copy()
        tokens = rng.integers(0, 7, size=(3, 4))
        assert np.array_equal(table_rows(tokens, table), table_rows(tokens, table))
        after = [x, values(base), *(d.a for d in few), *(d.b for d in few)]
        assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))
        assert np.array_equal(values(table.base), kept)
        for array in (x, values(base), few[0].a, few[0].b):
            assert not np.shares_memory(first, array)


def test_one_delta_needs_no_copy_of_the_output():
    """Of a head with 50,000 outputs that would be a third array of that size."""
    rng = np.random.default_rng(21)
    x, w = normal(rng, 1, 8, 4), normal(rng, 50_000, 4)
    delta = Delta(a=normal(rng, 1, 4), b=normal(rng, 50_000, 1), scale=1.0)
    tracemalloc.start()
    try:
        y = linear(x, Adapted(w, (delta,)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * y.nbytes  # the result and the change that is added to it
