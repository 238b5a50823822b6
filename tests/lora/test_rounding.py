"""Rounding from float64 to a storage format, against exact fractions; and what rounding twice would have done."""

import math
from fractions import Fraction

import numpy as np
import pytest

from refgemma.lora.tiles import FORMATS, format_of, largest, rounded, widened
from refgemma.numerics import Bfloat16Matrix, from_bfloat16, to_bfloat16
from refgemma.ops.linear import Adapted

# Significant bits, and exponents of the smallest subnormal number and of what is too large.
SHAPES = {"bfloat16": (8, -133, 128), "float16": (11, -24, 16), "float32": (24, -149, 128)}


def nearest_by_hand(x, form):
    """Nearest number of the format, ties to even, in exact arithmetic."""
    bits, smallest, too_large = SHAPES[form]
    if not math.isfinite(x) or x == 0:
        return x
    _, exponent = math.frexp(x)  # |x| is in [1/2, 1) times 2 ** exponent
    quantum = Fraction(2) ** max(exponent - bits, smallest)
    near = round(Fraction(x) / quantum) * quantum  # Python rounds fractions half to even
    if abs(near) >= Fraction(2) ** too_large:
        return math.copysign(math.inf, x)
    return math.copysign(float(near), x)


def awkward_numbers():
    """All sizes, ties of every format and numbers that miss one by a hair, subnormal numbers, borders of the range."""
    rng = np.random.default_rng(1)
    numbers = [np.ldexp(rng.normal(size=400), rng.integers(-160, 140, size=400)), rng.normal(size=400) * 0.02]
    for bits, smallest, too_large in SHAPES.values():
        for exponent in (-30, -1, 0, 5, smallest + bits - 1, smallest + 1, too_large - 1):
            steps = np.concatenate([rng.integers(2 ** (bits - 1), 2**bits, size=40), [2**bits - 1]]).astype(float)
            if exponent < smallest + bits:  # subnormal numbers: as many steps, of the smallest width
                steps = rng.integers(0, 2 ** max(exponent - smallest, 1), size=40).astype(float)
            unit = math.ldexp(1.0, max(exponent - bits + 1, smallest))
            tie = (steps + 0.5) * unit
            numbers += [tie, *(tie * (1 + sign * 2.0**-k) for sign in (-1, 1) for k in (20, 26, 33, 45, 52))]
    x = np.concatenate([*numbers, [0.0, -0.0, math.inf, -math.inf]])
    return np.concatenate([x, -x])


@pytest.mark.parametrize("form", FORMATS[:-1])
def test_rounded_is_the_nearest_number(form):
    x = awkward_numbers()
    want = np.array([nearest_by_hand(float(v), form) for v in x])
    got = widened(rounded(x, form), form)
    assert np.array_equal(got.view(np.uint64), want.view(np.uint64))  # signs of zeros as well
    if form != "float32":
        with np.errstate(over="ignore"):
            single = x.astype(np.float32)
            twice = widened(to_bfloat16(single) if form == "bfloat16" else single.astype(form), form)
        assert np.any(twice != want)  # by way of float32: the usual mistake


def test_rounding_twice_in_one_number():
    """Just above the middle between 1 and its neighbour: float32 drops the hair, and the tie goes to the even 1."""
    above = np.array([1 + 2.0**-8 + 2.0**-40])
    assert widened(rounded(above, "bfloat16"), "bfloat16") == 1 + 2.0**-7
    assert from_bfloat16(to_bfloat16(above.astype(np.float32))) == 1
    above = np.array([1 + 2.0**-11 + 2.0**-40])
    assert rounded(above, "float16") == 1 + 2.0**-10
    assert above.astype(np.float32).astype(np.float16) == 1


def test_bfloat16_numbers_stay_and_nan_stays_nan():
    every = np.arange(2**16, dtype=np.uint16)
    nan = np.isnan(from_bfloat16(every))
    wide = widened(every, "bfloat16")
    again = rounded(wide, "bfloat16")
    assert np.array_equal(again[~nan], every[~nan])
    assert np.isnan(from_bfloat16(again[nan])).all()


@pytest.mark.parametrize("form", FORMATS[:-1])
def test_largest(form):
    bits, _, too_large = SHAPES[form]
    assert largest(form) == (2.0 - 2.0 ** (1 - bits)) * 2.0 ** (too_large - 1)


def test_format_of():
    matrix = np.zeros((2, 3), np.float16)
    assert format_of(matrix) == "float16"
    assert format_of(Adapted(matrix, ())) == "float16"
    assert format_of(Adapted(Bfloat16Matrix(np.zeros((2, 3), np.uint16)), ())) == "bfloat16"
