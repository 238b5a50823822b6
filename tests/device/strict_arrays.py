"""A stand-in for CuPy on a machine without a GPU: NumPy arrays in a wrapper as strict as ``cupy.ndarray``.

It stands in for it at the borders, where portable code goes wrong: nothing turns into a NumPy array unless asked to by
``get()`` or `asnumpy`, NumPy arrays do not mix with its own, a scalar result is an array of no axes on the device, and
there is no function, method or parameter that CuPy has not. Which there are is read from ``cupy_api.json``, made from
CuPy itself by `tests.device.make_cupy_api`, so it knows nothing of what refgemma uses. The numbers are NumPy's.

Where it differs from CuPy, other than in digits and speed:

- an index out of bounds is an error; CuPy wraps it around, or reads what is there;
- the order of stores to one place through an index array is NumPy's; CuPy's is undefined;
- reductions and the like refuse NumPy arrays; CuPy hands some of them on to the array's own method, which computes on
  the host in silence;
- NumPy's functions outside its main module, and methods of its ufuncs such as ``np.add.reduce``, refuse device arrays;
  CuPy takes some of them over;
- casts of negative or infinite numbers to unsigned ones are NumPy's; CuPy's are others;
- what kernels there are for which dtypes, and which library of CUDA is missing, only a GPU tells;
- no streams, no second device, nothing asynchronous, no shortage of memory; no `cupy.random`, `linalg`, `fft`, `cuda`.

References
----------
CuPy 14, user guide, "Differences between CuPy and NumPy"; cupy/_core: core.pyx (ndarray), _routines_indexing.pyx,
_kernel.pyx and _scalar.pyx (what a ufunc takes).
"""

import inspect
import json
import operator
import types
from pathlib import Path

import numpy as np

API = json.loads(Path(__file__).with_name("cupy_api.json").read_text(encoding="utf-8"))

FUNCTIONS = {}  # by name, those of the module: `tests.device.strict_cupy` fills it

_COMPARISONS = ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")
_OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "lshift",
    "rshift",
    "and",
    "or",
    "xor",
    "matmul",
)
_SPECIAL = {"and": "and_", "or": "or_"}  # their names in `operator`


class ndarray:
    """An array on the device."""

    __module__ = "cupy"
    __array_priority__ = 100
    __hash__ = None

    def __init__(self, shape, dtype=float, order="C"):
        self._host = garbage(np.empty(shape, supported(dtype), order=order))

    # ---- the way to the host, which is taken on purpose or not at all

    def get(self, stream=None, order="C", out=None, blocking=True):
        if out is None:
            return np.array(self._host, order=order)
        out[...] = self._host
        return out

    def item(self):
        return self._host.item()

    def tolist(self):
        return self._host.tolist()

    def tobytes(self, order="C"):
        return self._host.tobytes(order)

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray) or (arr.dtype, arr.shape) != (self.dtype, self.shape):
            raise TypeError("set takes a numpy.ndarray of the same dtype and shape")
        self._host[...] = arr

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed: use .get()")

    def __bool__(self):
        return bool(self._host)

    def __int__(self):
        return int(self._host)

    def __float__(self):
        return float(self._host)

    def __complex__(self):
        return complex(self._host)

    def __repr__(self):
        return repr(self._host)

    def __str__(self):
        return str(self._host)

    def __format__(self, spec):
        return format(self._host, spec)

    # ---- what NumPy's own functions find when they are given one

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        name = ufunc.__name__
        if method != "__call__" or name not in API["functions"]:
            return NotImplemented
        if name in _COMPARISONS:
            inputs = [x.item() if isinstance(x, np.ndarray) and x.ndim == 0 else x for x in inputs]
        if "out" in kwargs:
            (kwargs["out"],) = kwargs["out"]
        return FUNCTIONS[name](*inputs, **kwargs)

    def __array_function__(self, function, types, args, kwargs):
        there = function.__module__ == "numpy" and function.__name__ in API["functions"]
        return FUNCTIONS[function.__name__](*args, **kwargs) if there else NotImplemented

    # ---- a container

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        return wrap(self._host[_index(index)])

    def __setitem__(self, index, value):
        parts = index if isinstance(index, tuple) else (index,)
        plain = all(part is None or part is Ellipsis or isinstance(part, (slice, int, np.integer)) for part in parts)
        # Into a plain part of an array goes an array of the device or one number; only through an index array does CuPy
        # take a NumPy array over by itself.
        if plain and not isinstance(value, ndarray) and np.shape(value) != ():
            raise ValueError(f"non-scalar {type(value)} cannot be used for fill")
        with np.errstate(all="ignore"):
            self._host[_index(index)] = value._host if isinstance(value, ndarray) else value

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        if casting is not None or subok is not None:
            raise TypeError("casting and subok are not supported yet")
        with np.errstate(all="ignore"):
            cast = self._host.astype(supported(dtype), order=order, copy=copy)
        return self if cast is self._host else wrap(cast)

    @property
    def flags(self):
        return types.SimpleNamespace(
            c_contiguous=self._host.flags.c_contiguous,
            f_contiguous=self._host.flags.f_contiguous,
            owndata=self._host.flags.owndata,
        )

    def __neg__(self):
        return wrap(-self._host)

    def __pos__(self):
        return self

    def __abs__(self):
        return wrap(abs(self._host))

    def __invert__(self):
        return wrap(~self._host)

    def __copy__(self):
        return wrap(self._host.copy())

    def __deepcopy__(self, memo):
        return wrap(self._host.copy())


# ---- between wrapper and wrapped


def wrap(value):
    """What NumPy gave, as it is on the device: never a NumPy scalar."""
    if isinstance(value, (np.ndarray, np.generic)):
        array = ndarray.__new__(ndarray)
        array._host = np.asarray(value)
        return array
    return type(value)(map(wrap, value)) if type(value) in (list, tuple) else value


def unwrap(value):
    """What NumPy is given; a NumPy array is refused."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    return type(value)(map(unwrap, value)) if type(value) in (list, tuple) else value


def _index(index):
    """An index as NumPy takes it. CuPy copies NumPy arrays in an index to the device by itself."""
    parts = [
        part._host if isinstance(part, ndarray) else part for part in (index if type(index) is tuple else (index,))
    ]
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)  # so that a single number comes as a view without axes
    return tuple(parts)


def supported(dtype):
    dtype = np.dtype(dtype)
    if dtype.kind not in "biufc":
        raise ValueError(f"Unsupported dtype {dtype}")
    return dtype


def garbage(host):
    """Memory that nobody has written yet holds what hurts."""
    host.fill({"f": np.nan, "c": np.nan, "b": True}.get(host.dtype.kind, 99))
    return host


def _signature(words):
    """A signature from its row of names."""
    kind, parameters = inspect.Parameter.POSITIONAL_OR_KEYWORD, []
    for word in words.split():
        if word == "/":
            parameters = [p.replace(kind=p.POSITIONAL_ONLY) for p in parameters]
        elif word == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
        elif word.startswith("*"):
            variable = inspect.Parameter.VAR_KEYWORD if word.startswith("**") else inspect.Parameter.VAR_POSITIONAL
            parameters.append(inspect.Parameter(word.lstrip("*"), variable))
            kind = inspect.Parameter.KEYWORD_ONLY
        else:
            default = None if word.endswith("=") else inspect.Parameter.empty
            parameters.append(inspect.Parameter(word.rstrip("="), kind, default=default))
    return inspect.Signature(parameters)


def forwarded(name, words, of_numpy):
    """NumPy's function, for device arrays, with no parameter that CuPy's has not."""
    signature, ufunc = _signature(words), isinstance(of_numpy, np.ufunc)

    def function(*args, **kwargs):
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}(): {error}") from None
        if ufunc and any(type(x) in (list, tuple) for x in args):
            raise TypeError(f"Unsupported type {list}")
        out = kwargs.get("out")
        with np.errstate(all="ignore"):  # a GPU has no floating-point warnings
            result = of_numpy(*map(unwrap, args), **{key: unwrap(value) for key, value in kwargs.items()})
        return wrap(result) if out is None else out

    function.__name__ = name
    return function


# ---- operators


def _operator(name):
    function = getattr(operator, _SPECIAL.get(name, name))

    def operate(one, other):
        for x in (one, other):
            if isinstance(x, np.ndarray):
                raise TypeError(f"Unsupported type {type(x)}")
            if not isinstance(x, (ndarray, np.generic, bool, int, float, complex)):
                return NotImplemented
        with np.errstate(all="ignore"):
            return wrap(function(unwrap(one), unwrap(other)))

    return operate


def _in_place(name):
    function = getattr(operator, f"i{name}")

    def operate(self, other):
        if not isinstance(other, (ndarray, np.generic, bool, int, float, complex)):
            raise TypeError(f"Unsupported type {type(other)}")
        with np.errstate(all="ignore"):
            function(self._host, unwrap(other))
        return self

    return operate


def _comparison(name):
    operate = _operator(name)

    def compare(self, other):
        # Alone among operations these take a NumPy array without axes.
        return operate(self, other.item() if isinstance(other, np.ndarray) and other.ndim == 0 else other)

    return compare


def _attribute(name):
    return property(lambda self: wrap(value) if isinstance(value := getattr(self._host, name), np.ndarray) else value)


def _method(name, words):
    call = forwarded(name, words, getattr(np.ndarray, name))
    return lambda self, *args, **kwargs: call(self, *args, **kwargs)


def _add_members():
    for name in _OPERATORS:
        operate = _operator(name)
        setattr(ndarray, f"__{name}__", operate)
        setattr(ndarray, f"__r{name}__", lambda self, other, operate=operate: operate(other, self))
        if f"__i{name}__" in API["special methods"]:
            setattr(ndarray, f"__i{name}__", _in_place(name))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(ndarray, f"__{name}__", _comparison(name))
    for name in set(API["attributes"]) - {"base", "data", "device", "flags", "flat"}:
        setattr(ndarray, name, _attribute(name))
    for name, words in API["methods"].items():
        if name != "astype":
            setattr(ndarray, name, _method(name, words))


_add_members()
