"""Products with every kind of weight, against sums of exact fractions; and no stored matrix is ever widened whole."""

import os
import signal
import threading
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

import refgemma.compute.products as module
from refgemma.numerics import FLOAT32, Bfloat16Matrix, from_bfloat16, to_bfloat16
from refgemma.ops.linear import Adapted, Delta, linear, linears, table_rows
from tests.ops.weights import DTYPES, KINDS, normal, unit, use_threads, values, weight

OPERATIONS = ("linear", "table_rows")


def product_by_hand(x, w):
    """``x W^T``, and the same with all signs dropped, which the error is measured by; the sums are exact."""
    xs = [[Fraction(float(v)) for v in row] for row in x.reshape(-1, x.shape[-1])]
    ws = [[Fraction(float(v)) for v in row] for row in values(w)]
    shape = (*x.shape[:-1], len(ws))
    terms = [[[a * b for a, b in zip(xrow, wrow, strict=True)] for wrow in ws] for xrow in xs]
    want = [[float(sum(t)) for t in row] for row in terms]
    size = [[float(sum(map(abs, t))) for t in row] for row in terms]
    return np.reshape(want, shape), np.reshape(size, shape)


SHAPES = [(1, 1), (1, 2), (2, 1), (5, 3), (7, 4), (8, 5), (9, 6), (10, 10), (3, 20), (3, 21), (2, 64), (41, 7)]  # O, I


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.usefixtures("tiny_tiles", "on_each_library")
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
@pytest.mark.usefixtures("on_each_library")
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
@pytest.mark.filterwarnings(
    "ignore:invalid value encountered in (matmul|dot)"
)  # BLAS fills up its lanes, with infinity * 0 too
@pytest.mark.usefixtures("on_each_library")
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
@pytest.mark.usefixtures("on_each_library")
def test_nan_stays_where_it_is(dtype):
    bits = to_bfloat16(np.ones((6, 4), np.float32))
    bits[2, 1] = bits[4, 2] = 0x7FC0
    got = linear(np.ones((1, 1, 4), dtype), Bfloat16Matrix(bits))[0, 0]
    assert np.array_equal(got, [4, 4, np.nan, 4, np.nan, 4], equal_nan=True)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("on_each_library")
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


@pytest.mark.usefixtures("on_each_library")
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


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@pytest.mark.usefixtures("tiny_tiles")
def test_products_of_two_threads_are_those_of_one(kind):
    """Bit by bit, and again and again: what a part computes depends on no other part, nor on who computes it."""
    rng = np.random.default_rng(11)
    x, w = [normal(rng, 2, 3, 10) for _ in range(2)], [weight(rng, 41, 10, kind) for _ in range(2)]
    want = [linear(x[i], w[i]) for i in range(2)]
    assert not np.array_equal(want[0], want[1])
    same = []

    def run(i):
        same.extend(np.array_equal(linear(x[i], w[i]), want[i]) for _ in range(50))

    both = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert same == [True] * 100


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.usefixtures("tiny_tiles", "on_each_library")
def test_weights_that_share_an_input(T):
    """Of any kinds and heights, so that a part ends in one matrix and goes on in the next, or holds one whole."""
    rng = np.random.default_rng(12)
    x = normal(rng, 1, T, 10)
    delta = Delta(a=normal(rng, 2, 10), b=normal(rng, 7, 2), scale=0.5)
    adapted = Adapted(weight(rng, 7, 10, "bfloat16"), (delta,))
    weights = [weight(rng, O, 10, kind) for O, kind in ((41, "float32"), (1, "bfloat16"), (5, "float16"))]
    *plain, changed = linears(x, (*weights, adapted))
    for w, got in zip(weights, plain, strict=True):
        want, size = product_by_hand(x, w)
        assert got.shape == (1, T, w.shape[0])
        # As for one weight: I products and I - 1 sums, and one more for the second order.
        assert np.all(np.abs(got - want) <= 11 * unit(np.float32) * size)
        if w.shape[0] > 1:  # a part that is one row off
            assert np.any(np.abs(got - np.roll(want, 1, axis=-1)) > 11 * unit(np.float32) * size)
    alone = linear(x, adapted)
    assert changed.shape == alone.shape
    # Twice the base's roundings, those of both factors (I, then R), and four for scale and sum: all of these sizes.
    base, size = product_by_hand(x, adapted.base)
    low = 0.5 * np.abs(x).astype(float) @ np.abs(delta.a.T) @ np.abs(delta.b.T)
    assert np.all(np.abs(changed - alone) <= 2 * (10 + 2 + 4) * unit(np.float32) * (size + low))
    assert np.any(np.abs(changed - base) > 2 * (10 + 2 + 4) * unit(np.float32) * (size + low))  # the delta counts


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.usefixtures("on_each_library")
def test_how_products_lie_in_memory_changes_no_number(kind, dtype, monkeypatch):
    """A result by columns is that by rows, bit by bit, and as good an input."""
    for name, small in (("_TILE", 20), ("_ROWS", 3), ("_WORTH", 1)):
        monkeypatch.setattr(module, name, small)
    use_threads(monkeypatch, 3)
    rng = np.random.default_rng(13)
    for T in (1, 2, 11):
        x = normal(rng, 2, T, 10, dtype=dtype)
        weights = [weight(rng, O, 10, kind) for O in (41, 3)]
        adapted = Adapted(
            weights[0], (Delta(a=normal(rng, 2, 10, dtype=dtype), b=normal(rng, 41, 2, dtype=dtype), scale=0.5),)
        )
        for turned in (1, 2**13):
            monkeypatch.setattr(module, "_WORTH_TURNING", turned)
            rows = linears(x, (*weights, adapted))
            columns = linears(x, (*weights, adapted), columns=True)
            for got, want in zip(columns, rows, strict=True):
                assert got.shape == want.shape == (2, T, want.shape[-1])
                assert np.array_equal(got, want)
            w = weight(rng, 7, 41, kind)
            again = linear(columns[0], w)
            want, size = product_by_hand(columns[0], w)
            # As for any input: I products, I - 1 sums, and one more for the second order.
            assert np.all(np.abs(again - want) <= 42 * unit(dtype) * size)
            if T > 1:  # tokens read in the other order
                assert np.any(np.abs(again - want[:, ::-1]) > 42 * unit(dtype) * size)


def test_products_by_columns_are_left_as_blas_makes_them(monkeypatch):
    monkeypatch.setattr(module, "_WORTH", 1)
    use_threads(monkeypatch, 3)
    rng = np.random.default_rng(14)
    x, w = normal(rng, 1, 6, 10), normal(rng, 41, 10)
    [rows], [columns] = linears(x, [w]), linears(x, [w], columns=True)
    assert rows.flags.c_contiguous
    assert columns[0].T.flags.c_contiguous


@pytest.mark.parametrize("T", [1, 7, 8, 9, 24])
def test_turning_around_changes_the_order_in_memory_only(T):
    x = normal(np.random.default_rng(15), T, 5)
    turned = module._by_columns(x)
    assert np.array_equal(turned, x)
    assert turned.flags.f_contiguous
    assert module._by_columns(turned) is turned


def test_one_wrong_width_among_several_is_one_clear_sentence():
    x, fits = np.zeros((1, 2, 8), np.float32), np.zeros((3, 8), np.float32)
    with pytest.raises(ValueError, match=r"^x has 8 channels, the weight has shape \(8, 3\): expected \(out, 8\)$"):
        linears(x, (fits, fits.T))
    with pytest.raises(ValueError, match=r"^the weight is float64, wider than the activations, float32"):
        linears(x, (fits, fits.astype(np.float64)))


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "adapted"])
@pytest.mark.usefixtures("on_each_library")
def test_wrong_widths_are_one_clear_sentence(kind):
    rng = np.random.default_rng(18)
    w = weight(rng, 5, 8, "float32" if kind == "adapted" else kind)
    if kind == "adapted":
        w = Adapted(w, ())
    with pytest.raises(ValueError, match=r"^x has 5 channels, the weight has shape \(5, 8\): expected \(out, 5\)$"):
        linear(np.zeros((1, 2, 5), np.float32), w)


@pytest.mark.usefixtures("on_each_library")
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system lacks")
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(monkeypatch):
    """A child inherits the pool but none of its threads, and waited for them for ever."""
    use_threads(monkeypatch, 2)
    rng = np.random.default_rng(7)
    x, w = normal(rng, 1, 64), weight(rng, 128, 64, "bfloat16")
    want = linear(x, w)  # the parent's threads exist from here on
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits
        os._exit(0 if np.array_equal(linear(x, w), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
