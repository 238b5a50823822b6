"""The stand-in refuses what CuPy refuses: these tests run on it, and on CuPy itself where there is a GPU.

Each comes from CuPy's source or was tried on CuPy: a stand-in that is kinder than the real thing lets portability rot.
"""

import importlib.util
import json

import numpy as np
import pytest

from tests.device import make_cupy_api
from tests.device.strict_arrays import API, ndarray
from tests.device.strict_cupy import cupy

HOST = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def xp(device_xp):
    """Libraries of a device only."""
    return device_xp


@pytest.fixture
def x(xp):
    return xp.asarray(HOST)


# ---- nothing turns into a NumPy array by itself


@pytest.mark.parametrize(
    "convert",
    [np.asarray, np.array, lambda x: np.asarray([x, x]), lambda x: np.float32(x[0, 0])],
    ids=["asarray", "array", "list", "scalar"],
)
def test_implicit_conversion_is_refused(x, convert):
    with pytest.raises(TypeError, match="Implicit conversion to a NumPy array is not allowed"):
        convert(x)


def test_a_number_on_the_device_is_no_index(x):
    with pytest.raises(TypeError):
        [1, 2, 3][x[0, 1].astype(int)]
    with pytest.raises(TypeError):
        range(x[0, 1].astype(int))


def test_an_array_is_neither_hashable_nor_an_iterator_without_axes(x):
    with pytest.raises(TypeError):
        hash(x)
    with pytest.raises(TypeError):
        iter(x.sum())


def test_explicit_ways_to_the_host_are_open(xp, x):
    assert isinstance(x.get(), np.ndarray)
    assert np.array_equal(x.get(), HOST)
    assert np.array_equal(xp.asnumpy(x), HOST)
    assert x.tolist() == HOST.tolist()
    one = x[1, 2]
    assert (one.item(), float(one), int(one), bool(one)) == (5.0, 5.0, 5, True)
    assert repr(x) == repr(HOST)
    assert [type(row) for row in x] == [type(x)] * 2
    with pytest.raises(ValueError):  # noqa: PT011  the words are NumPy's
        bool(x)


# ---- NumPy's arrays do not mix with the device's


@pytest.mark.parametrize("other", [np.ones((2, 3), np.float32), np.array(2.0, np.float32)], ids=["array", "no axes"])
@pytest.mark.parametrize(
    "mix",
    [
        lambda xp, x, y: x + y,
        lambda xp, x, y: y + x,
        lambda xp, x, y: x * y,
        lambda xp, x, y: y / x,
        lambda xp, x, y: x**y,
        lambda xp, x, y: xp.exp(y),
        lambda xp, x, y: xp.maximum(x, y),
        lambda xp, x, y: np.add(x, y),
        lambda xp, x, y: xp.where(x > 0, x, y),
        lambda xp, x, y: np.where(x > 0, x, y),
        lambda xp, x, y: x.__iadd__(y),
        lambda xp, x, y: xp.concatenate([y, y]),
    ],
)
def test_arithmetic_with_numpy_arrays_is_refused(xp, x, mix, other):
    with pytest.raises(TypeError):
        mix(xp, x, other)


def test_products_with_numpy_arrays_are_refused(xp, x):
    for product in (lambda: x @ HOST.T, lambda: HOST.T @ x, lambda: xp.matmul(x, HOST.T), lambda: x.dot(HOST.T)):
        with pytest.raises(TypeError):
            product()


def test_lists_are_no_operands(xp, x):
    numbers = [1.0, 2.0, 3.0]
    for use in (lambda: x + numbers, lambda: numbers * x, lambda: xp.exp(numbers)):
        with pytest.raises(TypeError):
            use()


def test_comparisons_take_a_numpy_array_without_axes_and_no_other(x):
    assert (x > np.array(2.0)).get().tolist() == (HOST > 2).tolist()
    with pytest.raises(TypeError):
        x > HOST  # noqa: B015


@pytest.mark.parametrize("number", [2, 2.5, True, np.float32(2), np.int64(3)])
def test_numbers_of_python_and_numpy_are_operands(x, number):
    for got, want in ((x + number, HOST + number), (number - x, number - HOST), (x - number, HOST - number)):
        assert type(got) is type(x)
        assert got.dtype == want.dtype
        assert np.array_equal(got.get(), want)


def test_a_condition_is_an_array_of_the_device(xp, x):
    for condition in (True, HOST > 1):
        with pytest.raises((AttributeError, TypeError)):
            xp.where(condition, x, 0)


# ---- stores


def test_a_plain_part_takes_device_arrays_and_numbers_only(xp, x):
    for value in (HOST[0], [1.0, 2.0, 3.0]):
        with pytest.raises((ValueError, TypeError)):
            x[0] = value
    x[0], x[1, 1:] = xp.asarray(HOST[1]), 7
    assert x.get().tolist() == [[3, 4, 5], [3, 7, 7]]


def test_indices_may_be_arrays_of_either_side(xp, x):
    for index in (np.array([1, 0]), xp.asarray([1, 0]), [1, 0]):
        assert np.array_equal(x[index].get(), HOST[[1, 0]])
    for mask in (HOST > 2, xp.asarray(HOST > 2)):
        copy = x.copy()
        copy[mask] = 0
        assert np.array_equal(copy.get(), np.where(HOST > 2, 0, HOST))
    x[xp.asarray([True, False])] = xp.asarray([9.0, 8.0, 7.0])
    assert x[0].get().tolist() == [9, 8, 7]


def test_a_part_is_a_view_even_of_one_number(x):
    row, one = x[0], x[1, 1]
    row[:] = 8
    one[...] = 9
    assert x.get().tolist() == [[8, 8, 8], [3, 9, 5]]


def test_what_comes_from_the_host_is_a_copy(xp):
    host = HOST.copy()
    there = xp.asarray(host)
    host[:] = -1
    assert np.array_equal(there.get(), HOST)
    assert xp.asarray(there) is there
    there.get()[:] = -1
    assert np.array_equal(there.get(), HOST)


# ---- results stay on the device


def test_reductions_give_arrays_without_axes(xp, x):
    for result in (x.sum(), x.max(), xp.mean(x), x[0, 0], xp.exp(x[0, 0]), -x[0, 0], x[0, 0] + 1, xp.array_equal(x, x)):
        assert type(result) is type(x)
        assert result.shape == ()


def test_numpys_functions_hand_over_to_the_library(xp, x):
    for result in (
        np.exp(x),
        np.sum(x, axis=1),
        np.concatenate([x, x]),
        np.where(x > 0, x, 0),
        np.broadcast_to(x, (4, 2, 3)),
    ):
        assert type(result) is type(x)


# ---- there is no more than CuPy has


@pytest.mark.parametrize(
    "use",
    [
        lambda xp, x: x.max(axis=1, initial=-1),
        lambda xp, x: x.sum(axis=1, where=x > 0),
        lambda xp, x: xp.exp(x, where=x > 0),
        lambda xp, x: xp.maximum.reduce(x),
        lambda xp, x: x.astype(np.float64, casting="safe"),
        lambda xp, x: x.astype(object),
        lambda xp, x: x.setflags(write=False),
        lambda xp, x: x.flags.writeable,
        lambda xp, x: x.resize((3, 2)),
        lambda xp, x: xp.errstate(),
        lambda xp, x: xp.no_such_function(x),
    ],
)
def test_what_cupy_lacks_is_refused(xp, x, use):
    with pytest.raises((TypeError, AttributeError, ValueError, NotImplementedError)):
        use(xp, x)


def test_the_table_of_functions_is_that_of_the_installed_cupy():
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("needs CuPy, if only to look at its signatures: it is not installed")
    import cupy as installed

    if installed.__version__ != API["cupy"]:
        pytest.skip(f"CuPy {installed.__version__} is installed, the table is that of {API['cupy']}")
    assert json.loads(make_cupy_api.text(make_cupy_api.api(installed))) == API


def test_the_stand_in_has_nothing_that_cupy_has_not():
    own = {"_host", "__dict__", "__weakref__", "__annotations__", "__firstlineno__", "__static_attributes__"}
    host = {"get", "item", "set", "tobytes", "tolist"}
    known = {*API["methods"], *API["attributes"], *API["special methods"], *host, *own}
    # Members that NumPy's arrays lack, so that the table does not list them.
    assert set(vars(ndarray)) <= known
    assert set(vars(cupy)) - {"__name__", "__doc__", "__package__", "__loader__", "__spec__"} <= {
        *API["functions"],
        *API["numpy's own"],
        *("ndarray", "asnumpy", "get_array_module"),
    }


def test_fresh_memory_is_not_zero(xp):
    """Not a promise of CuPy's, but what must be reckoned with; the stand-in makes sure that it is seen."""
    if xp is cupy:
        assert np.isnan(xp.empty((2, 2), np.float32).get()).all()
        assert xp.empty_like(xp.zeros(3, int)).get().tolist() == [99] * 3
