"""The module that stands in for CuPy: NumPy's functions, as far as CuPy has them, for the arrays of `strict_arrays`."""

import types

import numpy as np

from tests.device.strict_arrays import API, FUNCTIONS, forwarded, garbage, ndarray, supported, unwrap, wrap

cupy = types.ModuleType("cupy", __doc__)  # what ``import cupy`` gives while it stands in


def _array(obj, dtype=None, copy=True, order="K"):
    """A copy of anything on the device; the one thing that NumPy arrays may be given to."""
    if isinstance(obj, ndarray) and not copy and (dtype is None or np.dtype(dtype) == obj.dtype):
        return obj
    if type(obj) in (list, tuple):
        obj = [unwrap(x) if isinstance(x, ndarray) else x for x in obj]
    host = np.array(obj._host if isinstance(obj, ndarray) else obj, dtype, order=order)
    supported(host.dtype)
    return wrap(host)


def _asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    return _array(a, dtype, bool(copy), order or "K")


def _contiguous(order):
    def function(a, dtype=None):
        kept = isinstance(a, ndarray) and a._host.flags[f"{order}_CONTIGUOUS"]
        return _array(a, dtype, not kept, order)

    return function


def _where(condition, x=None, y=None):
    if not isinstance(condition, ndarray):
        raise AttributeError(f"{type(condition)} object is no device array")
    return _elementwise_where(condition.astype(bool, copy=False), x, y) if x is not None else condition.nonzero()


def _add_functions():
    for name in API["numpy's own"]:
        setattr(cupy, name, getattr(np, name))
    for name, words in API["functions"].items():
        setattr(cupy, name, forwarded(name, words, getattr(np, name)))
    for name in ("allclose", "array_equal", "array_equiv"):  # NumPy gives Python's bool
        plain = getattr(cupy, name)
        setattr(cupy, name, lambda *args, plain=plain, **kwargs: wrap(np.bool_(plain(*args, **kwargs))))
    for name in ("empty", "empty_like"):
        plain = getattr(cupy, name)
        setattr(cupy, name, lambda *args, plain=plain, **kwargs: wrap(garbage(plain(*args, **kwargs)._host)))
    cupy.ndarray, cupy.array, cupy.asarray, cupy.asanyarray = ndarray, _array, _asarray, _asarray
    cupy.ascontiguousarray, cupy.asfortranarray = _contiguous("C"), _contiguous("F")
    cupy.where = _where
    cupy.asnumpy = lambda a, stream=None, order="C", out=None, *, blocking=True: (
        a.get(order=order, out=out) if isinstance(a, ndarray) else np.asarray(a)
    )
    cupy.get_array_module = lambda *args: cupy if any(isinstance(a, ndarray) for a in args) else np


_elementwise_where = forwarded("where", API["functions"]["where"], np.where)
_add_functions()
FUNCTIONS.update({name: getattr(cupy, name) for name in API["functions"]})
