"""Unit roundoffs, against the formats themselves; what is a constant; weights as an engine holds them."""

import math

import numpy as np
import pytest

from refgemma.numerics import PROFILES, Bfloat16Matrix, from_bfloat16, to_bfloat16
from refgemma.oracle.bounds.arithmetic import CONSTANTS, UNIT, arithmetic_of, confidence, params_in
from tests.models import map_params, random_model


def bfloat16(x):
    return from_bfloat16(to_bfloat16(x)).astype(np.float64)


@pytest.mark.parametrize(
    ("name", "narrow"), [("bfloat16", bfloat16), ("float16", lambda x: x.astype(np.float16).astype(np.float64))]
)
def test_the_unit_is_the_largest_relative_error_of_one_rounding(name, narrow):
    x = np.linspace(1, 2, 100_001, dtype=np.float32)[:-1]
    worst = np.max(np.abs(narrow(x) - x) / x)
    unit = arithmetic_of(name).narrow
    # Reached just above 1, at the first midpoint; 1e5 numbers come within a thousandth of it. Half the unit is refuted.
    assert 0.99 * unit < worst <= unit
    assert unit == UNIT[name] / (1 + UNIT[name])


def test_bfloat16_has_eight_significant_bits():
    assert UNIT["bfloat16"] == 2.0**-8
    assert bfloat16(np.array([1 + 2.0**-7], np.float32)) == 1 + 2.0**-7  # the spacing
    assert bfloat16(np.array([1 + 2.0**-8], np.float32)) == 1  # half of it: a tie, to even


def test_constants_are_exact_and_everything_else_is_allowed_for():
    for name, profile in PROFILES.items():
        a = arithmetic_of(name)
        rounded = {point for point, narrow in profile.rounding.items() if narrow == "bfloat16"}
        assert a.points == rounded - set(CONSTANTS)
        assert set(a.reference.rounding) == rounded & set(CONSTANTS)
        assert a.reference.dtype == np.float64
    deepmind = arithmetic_of("bf16-deepmind")
    assert deepmind.at("norm.mean") == deepmind.narrow
    assert deepmind.at("norm.gain") == arithmetic_of("bf16-transformers").at("norm.mean") == 0
    # float16 rounds constants to other numbers, so they are roundings there.
    assert arithmetic_of("float16").at("embed.scale") == arithmetic_of("float16").narrow
    changed = PROFILES["bf16-transformers"].with_("norm.mean", "bfloat16")
    assert arithmetic_of(changed).at("norm.mean") > 0
    assert arithmetic_of(deepmind) is deepmind


def test_an_unknown_arithmetic_is_refused():
    with pytest.raises(
        ValueError, match=r"^unknown arithmetic 'bf16': expected one of float32, float64, bf16-transformers, "
    ):
        arithmetic_of("bf16")


def test_weights_are_those_of_the_engine():
    params = random_model(0).params
    assert params_in(params, arithmetic_of("float32")) is params
    narrow = params_in(params, arithmetic_of("bfloat16"))
    assert narrow["head"] is narrow["embed"]
    assert np.array_equal(narrow["layers"][0]["mlp"]["up"], bfloat16(params["layers"][0]["mlp"]["up"]))
    assert not np.array_equal(narrow["final_norm"], params["final_norm"])
    again = params_in(narrow, arithmetic_of("bfloat16"))
    assert again["embed"] is narrow["embed"]
    stored = map_params(lambda w: Bfloat16Matrix(to_bfloat16(w)) if w.ndim == 2 else w, params)
    assert params_in(stored, arithmetic_of("bfloat16"))["embed"] is stored["embed"]
    half = params_in(params, arithmetic_of("float16"))
    assert np.array_equal(half["embed"], params["embed"].astype(np.float16).astype(np.float32))


def test_confidence_is_hoeffdings():
    # P(|error| > t sigma) <= 2 exp(-t**2 / 2) for each; a millionth for all of them.
    for size in (1, 1000, 10**8):
        assert size * 2 * math.exp(-(confidence(size) ** 2) / 2) == pytest.approx(1e-6)
