"""Engines that go on in the format of half-precision logits: each rounding by hand, and what it does to ties and cuts.

Held against PyTorch and JAX themselves in ``tests/peers/test_half_precision_sampling.py``.
"""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest

from refgemma.sampling import SamplingParams, compare
from refgemma.sampling.engines import ENGINES, Refused, distribution, google
from refgemma.sampling.engines.engine import rounded

HALVES = ("float16", "bfloat16")
IN_HALF = ("gemma_pytorch", "google-deepmind/gemma")


def of(name, logits, dtype, **settings):
    """What an engine would draw from, at temperature 1 unless said otherwise."""
    params = SamplingParams(**{"temperature": 1.0} | settings)
    return distribution(name, np.asarray(logits, np.float32), params, logits_dtype=dtype)


def by_hand(x, dtype):
    """The nearest number of a format, ties to even: float16 by the standard library, bfloat16 in exact arithmetic."""
    x = float(x)
    if not math.isfinite(x) or not x:
        return x
    if dtype == "float16":
        return struct.unpack("<e", struct.pack("<e", x))[0]
    unit = Fraction(2) ** (math.frexp(x)[1] - 8)  # 8 significant bits
    return float(round(Fraction(x) / unit) * unit)  # Python rounds a half to even


def numbers(rng, V, dtype, scale=3.0):
    return rounded((rng.normal(size=V) * scale).astype(np.float32), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_to_the_nearest_and_ties_to_even(dtype):
    rng = np.random.default_rng(1)
    some = (rng.normal(size=500) * 10.0 ** rng.integers(-3, 4, size=500)).astype(np.float32)
    coarse = rounded(some, dtype)
    halfway = (coarse + np.nextafter(coarse, np.inf, dtype=np.float32)) / 2
    half_unit = np.float32(2.0**-9 if dtype == "bfloat16" else 2.0**-12)
    halfway = np.concatenate([halfway, coarse * (1 + half_unit)])
    for x in np.concatenate([some, halfway]):
        assert rounded(x[None], dtype)[0] == by_hand(x, dtype)
    assert np.any(rounded(some, dtype) != some)
    assert rounded(np.float32([-np.inf]), dtype)[0] == -np.inf


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", sorted(set(ENGINES) - set(IN_HALF)))
def test_engines_that_widen_do_the_same_with_half_precision_logits(name, dtype):
    logits = numbers(np.random.default_rng(2), 50, dtype)
    settings = {"temperature": 0.7} | ({} if name == "openai" else {"top_k": 20})
    half, wide = (of(name, logits, given, **settings) for given in (dtype, "float32"))
    assert np.array_equal(half.probs, wide.probs)
    assert half.states[0].rule == f"As given, in {dtype}"


# ---- gemma_pytorch: the quotient is rounded, the rest is float32


@pytest.mark.parametrize("dtype", HALVES)
def test_the_quotient_of_gemma_pytorch_is_in_the_format_of_the_logits(dtype):
    logits = numbers(np.random.default_rng(3), 300, dtype)
    got = of("gemma_pytorch", logits, dtype, temperature=0.7)
    quotients = got.states[1].scores
    # float32 first: the temperature is a float32 there, and PyTorch computes in the wider of two formats.
    want = [by_hand(np.float32(x) / np.float32(0.7), dtype) for x in logits]
    assert quotients.tolist() == want
    exact = np.exp(np.array(want) - max(want))
    # From here on all is float32: an exponential, a division, and a sum of 300.
    assert np.all(np.abs(got.probs - exact / exact.sum()) <= got.probs * (300 + 4) * 2.0**-24)
    assert got.probs.dtype == np.float32
    widened = of("gemma_pytorch", logits, "float32", temperature=0.7)
    assert np.mean(widened.states[1].scores != quotients) > 0.75
    assert np.abs(widened.probs - got.probs).max() > 1000 * 2.0**-24


def test_ties_that_the_quotient_makes_decide_what_top_k_keeps():
    """10.625 and 10.6875 at temperature 1.1 are 9.659 and 9.716: bfloat16 has 9.625, 9.6875, 9.75 there."""
    logits = [10.625, 10.6875, 0.0]
    settings = {"temperature": 1.1, "top_k": 1}
    assert of("gemma_pytorch", logits, "bfloat16", **settings).kept.tolist() == [0]
    assert of("gemma_pytorch", logits, "float32", **settings).kept.tolist() == [1]
    assert of("gemma_pytorch", logits, "float16", **settings).kept.tolist() == [1]  # 9.656 and 9.719
    # The others cut before the temperature, or widen first.
    for name in set(ENGINES) - {"gemma_pytorch", "openai"}:
        assert of(name, logits, "bfloat16", **settings).kept.tolist() == [1]


# ---- DeepMind: every operation is rounded


def divided_by_hand(x, by, dtype):
    """A product with the reciprocal, which is a float16 in float16 and a float32 in bfloat16."""
    reciprocal = np.float32(1) / np.float32(by)
    if dtype == "float16":
        reciprocal = by_hand(reciprocal, dtype)
    return by_hand(np.float32(x) * np.float32(reciprocal), dtype)


def running_sums_by_hand(values, dtype):
    """In blocks of 16, each addition rounded; then what came before a block is added to all of it."""
    blocks = [values[i : i + 16] for i in range(0, len(values), 16)]
    within = []
    for block in blocks:
        sums = [block[0]]
        for value in block[1:]:
            sums.append(by_hand(sums[-1] + value, dtype))
        within.append(sums + sums[-1:] * (16 - len(sums)))
    if len(blocks) > 1:
        before = running_sums_by_hand([sums[-1] for sums in within], dtype)
        within[1:] = [
            [by_hand(total + value, dtype) for value in sums] for total, sums in zip(before, within[1:], strict=False)
        ]
    return [value for sums in within for value in sums][: len(values)]


def kept_by_hand(logits, temperature, p, dtype):
    """Ids that DeepMind's top-p keeps, each operation rounded, in Python floats."""
    scaled = [divided_by_hand(x, by_hand(np.float32(temperature), dtype), dtype) for x in logits]
    descending = sorted(scaled, reverse=True)
    differences = np.float32([by_hand(x - descending[0], dtype) for x in descending])
    weights = [by_hand(x, dtype) for x in np.exp(differences)]
    total = by_hand(np.float32(math.fsum(weights)), dtype)
    sums = running_sums_by_hand([divided_by_hand(x, total, dtype) for x in weights], dtype)
    place = sum(mass < by_hand(np.float32(p), dtype) for mass in sums)
    return [i for i, x in enumerate(scaled) if place >= len(sums) or x >= descending[place]]


@pytest.mark.parametrize("dtype", HALVES)
def test_deepmind_computes_in_the_format_of_the_logits(dtype):
    rng = np.random.default_rng(4)
    widened = 0
    for _ in range(120):
        logits = numbers(rng, int(rng.choice([3, 15, 16, 17, 40, 300, 300])), dtype, scale=rng.choice([0.3, 2.0]))
        settings = {"temperature": float(rng.choice([0.3, 0.7, 1.6])), "top_p": float(rng.uniform(0.1, 0.99))}
        want = kept_by_hand(logits.tolist(), settings["temperature"], settings["top_p"], dtype)
        assert of("google-deepmind/gemma", logits, dtype, **settings).kept.tolist() == want
        widened += of("google-deepmind/gemma", logits, "float32", **settings).kept.tolist() != want
    assert widened >= 5  # the test can see it


def test_deepmind_rounds_the_temperature_itself():
    """0.7 is 0.69921875 in bfloat16; 3.5 of it is 5.005586, to bfloat16 5.0, and 10.5 is 15.0168, to bfloat16 15.0."""
    scores = of("google-deepmind/gemma", [3.5, 28.0, 1.3984375], "bfloat16", temperature=0.7).states[1].scores
    assert scores.tolist() == [5.0, 40.0, 2.0]
    assert np.float32(1.3984375) / np.float32(0.7) < 2  # and so it would be with a temperature that is not rounded
    gemma_pytorch = of("gemma_pytorch", [28.0, 1.3984375], "bfloat16", temperature=0.7).states[1].scores
    assert gemma_pytorch.tolist() == [40.0, 2.0]  # rounded the same way here, but only here


def test_a_long_tail_does_not_stop_the_running_sum_of_deepmind():
    """2048 equal tokens: each is 1/2048 exactly, and a plain running sum in bfloat16 stops growing at 1/8."""
    sums = google.running_sums(np.full(2048, 2.0**-11, np.float32), "bfloat16")
    assert sums[-1] == 1.0
    plain = 0.0
    for _ in range(2048):
        plain = by_hand(plain + 2.0**-11, "bfloat16")
    assert plain == 0.125


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 33, 257, 4097])
def test_running_sums(dtype, n):
    values = np.abs(numbers(np.random.default_rng(n), n, dtype)) / 1024
    got = google.running_sums(values, dtype)
    if dtype == "float32":  # at most 15 additions a level, and one more to join two levels, each rounded once
        levels = 1 + math.ceil(math.log(max(n, 2), 16))
        assert np.all(np.abs(got - np.cumsum(values, dtype=np.float64)) <= 16 * levels * 2.0**-24 * got)
    else:
        assert got.tolist() == running_sums_by_hand(values.tolist(), dtype)


# ---- which format


def test_the_format_of_the_array_is_the_default():
    logits = numbers(np.random.default_rng(5), 100, "float16")
    params = SamplingParams(temperature=0.7)
    for name in IN_HALF:
        implied = distribution(name, logits.astype(np.float16), params)
        assert np.array_equal(implied.probs, of(name, logits, "float16", temperature=0.7).probs)
        wide = distribution(name, logits, params)
        assert np.array_equal(wide.probs, of(name, logits, "float32", temperature=0.7).probs)
        assert not np.array_equal(wide.probs, implied.probs)


def test_a_comparison_names_the_rounding_as_the_step_where_engines_part():
    logits = numbers(np.random.default_rng(6), 100, "bfloat16")
    params = SamplingParams(temperature=0.7)
    assert compare(logits, params, ["transformers", "gemma_pytorch"]).partings == ()
    found = compare(logits, params, ["transformers", "gemma_pytorch"], logits_dtype="bfloat16").partings
    assert [parting.step for parting in found] == ["temperature"]
    assert "in the format of the logits" in found[0].rules[1]


@pytest.mark.parametrize(
    ("logits", "dtype", "message"),
    [
        (
            [1.0, 0.1],
            "bfloat16",
            r"^the logit of token 1 is 0\.1, which is not a bfloat16: expected logits as the",
        ),
        ([1.0, 2.0**-30], "float16", "^the logit of token 1 is 9.31.*e-10, which is not a float16: "),
        ([1e300, 1.0], "bfloat16", r"^the logit of token 0 is 1e\+300, which is not a bfloat16: "),
        ([1.0], "half", "^logits_dtype is 'half': expected one of float32, float16, bfloat16, or None$"),
    ],
)
def test_what_is_no_such_format(logits, dtype, message):
    with pytest.raises(ValueError, match=message):
        distribution("gemma_pytorch", np.array(logits), SamplingParams(), logits_dtype=dtype)


def test_quotients_beyond_float16_are_refused():
    """Infinite there: the softmax is NaN, and PyTorch's draw ends in an error."""
    with pytest.raises(Refused, match="gemma_pytorch gets no finite probabilities from its step temperature"):
        of("gemma_pytorch", [60000.0, 1.0], "float16", temperature=0.5)
    assert of("gemma_pytorch", [59904.0, 1.0], "bfloat16", temperature=0.5).kept.tolist() == [0, 1]
