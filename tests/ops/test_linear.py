"""Products with every kind of weight, against sums of exact fractions; and no stored matrix is ever widened whole."""

import threading
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

import refgemma.ops.linear as module
from refgemma.numerics import FLOAT32, FLOAT64, Bfloat16Matrix, Numerics, from_bfloat16, to_bfloat16
from refgemma.ops.linear import Adapted, Delta, linear, table_rows

DTYPES = (np.float32, np.float64)
KINDS = [  # of weight, and dtype of activations: all that is not narrowing
    *((kind, dtype) for kind in ("bfloat16", "float16", "float32") for dtype in DTYPES),
    ("float64", np.float64),
]


def unit(dtype):
    """What one rounding does, relatively."""
    return float(np.finfo(dtype).eps) / 2


def values(w):
    """The numbers of any operand without deltas."""
    return from_bfloat16(w.bits) if isinstance(w, Bfloat16Matrix) else w


def product_by_hand(x, w):
    """``x W^T``, and the same with all signs dropped, which the error is measured by; the sums are exact."""
    xs = [[Fraction(float(v)) for v in row] for row in x.reshape(-1, x.shape[-1])]
    ws = [[Fraction(float(v)) for v in row] for row in values(w)]
    shape = (*x.shape[:-1], len(ws))
    terms = [[[a * b for a, b in zip(xrow, wrow, strict=True)] for wrow in ws] for xrow in xs]
    want = [[float(sum(t)) for t in row] for row in terms]
    size = [[float(sum(map(abs, t))) for t in row] for row in terms]
    return np.reshape(want, shape), np.reshape(size, shape)


def normal(rng, *shape, dtype=np.float32):
    return rng.normal(size=shape).astype(dtype)


def weight(rng, O, I, kind):
    w = normal(rng, O, I)
    return Bfloat16Matrix(to_bfloat16(w)) if kind == "bfloat16" else w.astype(kind)


def use_threads(monkeypatch, count):
    controller = module._blas()[0]
    monkeypatch.setattr(module, "_blas", lambda: (controller, count))


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def tiny_tiles(request, monkeypatch):
    """Tiles of 20 numbers, so that small matrices have several and the last is cut off; and that many threads."""
    monkeypatch.setattr(module, "_TILE", 20)
    use_threads(monkeypatch, request.param)


SHAPES = [(1, 1), (1, 2), (2, 1), (5, 3), (7, 4), (8, 5), (9, 6), (10, 10), (3, 20), (3, 21), (2, 64), (41, 7)]  # O, I


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.usefixtures("tiny_tiles")
def test_linear_is_within_its_rounding_bound(kind, dtype):
    rng = np.random.default_rng(5)
    for O, I in SHAPES:
        for leading in ((1,), (2, 3), (1, 1, 2), (0, 2)):
            x = normal(rng, *leading, I, dtype=dtype)
            w = weight(rng, O, I, kind)
            before = x.copy(), values(w).copy()
            got = linear(x, w)
            assert got.dtype == dtype
            assert got.shape == (*leading, O)
            want, size = product_by_hand(x, w)
            # I products, I - 1 additions in any order: each term passes at most I roundings. One more, to second order.
            assert np.all(np.abs(got - want) <= (I + 1) * unit(dtype) * size)
            assert np.array_equal(x, before[0])
            assert np.array_equal(values(w), before[1])


@pytest.mark.parametrize("swap", ["neighbouring columns", "neighbouring rows", "sign of a column"])
def test_the_bound_rejects_a_weight_read_wrongly(swap):
    """What a slip in the arithmetic on pairs of bfloat16 numbers would look like."""
    rng = np.random.default_rng(6)
    x, w = normal(rng, 2, 3, 10), weight(rng, 8, 10, "bfloat16")
    want, size = product_by_hand(x, w)
    bits = w.bits.copy()
    if swap == "neighbouring columns":
        bits[:, [0, 1]] = bits[:, [1, 0]]
    elif swap == "neighbouring rows":
        bits[[0, 1]] = bits[[1, 0]]
    else:
        bits[:, 1] ^= 0x8000
    assert np.any(np.abs(linear(x, Bfloat16Matrix(bits)) - want) > 11 * unit(np.float32) * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2], ids=["odd width", "even width"])
def test_every_bfloat16_number_is_widened_exactly(columns, dtype):
    """Subnormals, infinities and both zeros included, in an odd and in an even column."""
    every = np.arange(2**16, dtype=np.uint16)
    every = every[~np.isnan(from_bfloat16(every))]
    for column in range(columns):
        bits = np.zeros((len(every), columns), np.uint16)
        bits[:, column] = every
        x = np.eye(columns, dtype=dtype)[None, column : column + 1]
        for T in (1, 4):
            got = linear(np.repeat(x, T, axis=1), Bfloat16Matrix(bits))
            assert np.array_equal(got, np.tile(from_bfloat16(every), (1, T, 1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_is(dtype):
    bits = to_bfloat16(np.ones((6, 4), np.float32))
    bits[2, 1] = bits[4, 2] = 0x7FC0
    got = linear(np.ones((1, 1, 4), dtype), Bfloat16Matrix(bits))[0, 0]
    assert np.array_equal(got, [4, 4, np.nan, 4, np.nan, 4], equal_nan=True)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_in_any_memory_layout(kind, dtype):
    rng = np.random.default_rng(8)
    w = weight(rng, 9, 6, kind)
    plain = normal(rng, 2, 3, 6, dtype=dtype)
    want, size = product_by_hand(plain, w)
    strided = np.zeros((4, 3, 12), dtype)[::2, :, ::2]
    fortran = np.asfortranarray(plain)
    backwards = np.ascontiguousarray(plain[::-1, :, ::-1])[::-1, :, ::-1]
    strided[...] = plain
    for x in (strided, fortran, backwards, np.broadcast_to(plain[:1], (2, 3, 6))):
        want, size = product_by_hand(x, w)
        assert np.all(np.abs(linear(x, w) - want) <= 7 * unit(dtype) * size)


def test_bits_as_they_lie_in_a_file():
    """Read-only, and at any address: the header of a safetensors file may end anywhere."""
    rng = np.random.default_rng(9)
    x, w = normal(rng, 1, 2, 10), weight(rng, 7, 10, "bfloat16")
    want = linear(x, w)
    for offset in range(4):
        raw = bytes(offset) + w.bits.tobytes()
        bits = np.ndarray(w.bits.shape, np.uint16, buffer=raw, offset=offset)
        assert not bits.flags.writeable
        assert np.array_equal(linear(x, Bfloat16Matrix(bits)), want)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_narrow_matrix_is_never_widened_whole(kind, dtype, monkeypatch):
    monkeypatch.setattr(module, "_TILE", 2**14)
    use_threads(monkeypatch, 2)
    rng = np.random.default_rng(10)
    x, w = normal(rng, 1, 1, 512, dtype=dtype), weight(rng, 2048, 512, kind)
    whole = 2048 * 512 * x.itemsize

    def peak(function, *arguments):
        tracemalloc.start()
        try:
            function(*arguments)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    linear(x, w)  # the threads exist from here on
    # Two threads with a tile each, a 64th of the matrix, and float64 has a float32 copy of a bfloat16 tile on the way.
    assert peak(linear, x, w) < whole / 16
    assert peak(module._widen, w, x.dtype) >= whole  # it can fail


def test_matrices_in_the_dtype_of_the_activations_are_not_copied():
    rng = np.random.default_rng(10)
    x, w = normal(rng, 1, 1, 512), normal(rng, 2048, 512)
    tracemalloc.start()
    linear(x, w)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < w.nbytes / 16


def test_products_at_once_leave_the_number_of_blas_threads_as_it_was(monkeypatch):
    """The limit inside a product is the process's: two that overlap could each restore the other's."""
    rng = np.random.default_rng(11)
    x, w = normal(rng, 1, 1, 4), weight(rng, 3, 4, "bfloat16")
    inside = [threading.Event(), threading.Event()]
    first_left = threading.Event()
    plain = module._tile_multiplier

    def slow_first(x, w):
        if not inside[0].is_set():
            inside[0].set()
            return lambda rows: (inside[1].wait(0.2), plain(x, w)(rows))[1]  # in vain where products take turns
        inside[1].set()
        return lambda rows: (first_left.wait(0.2), plain(x, w)(rows))[1]

    monkeypatch.setattr(module, "_tile_multiplier", slow_first)
    blas = module._blas()[0]

    def threads_now():
        return [lib["num_threads"] for lib in blas.select(user_api="blas").info()]

    with blas.limit(limits=2, user_api="blas"):
        before = threads_now()
        assert before
        assert 1 not in before
        first = threading.Thread(target=lambda: (linear(x, w), first_left.set()))
        second = threading.Thread(target=lambda: (inside[0].wait(), linear(x, w)))
        for thread in (first, second):
            thread.start()
        for thread in (first, second):
            thread.join()
        assert threads_now() == before


# ---- adapted weights


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


# ---- rounding and refusals


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


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "adapted"])
def test_wrong_widths_are_one_clear_sentence(kind):
    rng = np.random.default_rng(18)
    w = weight(rng, 5, 8, "float32" if kind == "adapted" else kind)
    if kind == "adapted":
        w = Adapted(w, ())
    with pytest.raises(ValueError, match=r"^x has 5 channels, the weight has shape \(5, 8\): expected \(out, 5\)$"):
        linear(np.zeros((1, 2, 5), np.float32), w)


def test_a_weight_wider_than_the_activations_is_refused():
    """Rather than narrowed in silence."""
    wide = np.ones((5, 8))
    message = r"^the weight is float64, wider than the activations, float32: its digits would be lost$"
    x = np.zeros((1, 2, 8), np.float32)
    with pytest.raises(ValueError, match=message):
        linear(x, wide)
    with pytest.raises(ValueError, match=message):
        linear(x, Adapted(wide, ()))
    with pytest.raises(ValueError, match=message):
        linear(x, Adapted(np.ones((5, 8), np.float32), (Delta(a=np.ones((2, 8)), b=np.ones((5, 2)), scale=1.0),)))
    with pytest.raises(ValueError, match=message):
        table_rows(np.array([[1]]), wide, FLOAT32)
