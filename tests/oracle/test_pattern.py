"""Each pattern on a planted error, among rounding noise; and silence on noise alone."""

import numpy as np
import pytest

from refgemma.numerics import from_bfloat16, to_bfloat16
from refgemma.oracle.judging.patterns import pattern

UNIT = 2.0**-24
B, T, N, H = 2, 24, 4, 16
POSITIONS = np.stack([np.arange(T), np.maximum(np.arange(T) - 5, -1)])  # row 1: five of padding
SHAPE = {"BTNH": (B, T, N, H), "BTD": (B, T, N * H), "BNTS": (B, N, T, T)}


def example(axes="BTNH", seed=0, unit=UNIT):
    """Ours, theirs with rounding noise, and what rounding may do."""
    rng = np.random.default_rng(seed)
    ours = rng.normal(size=SHAPE[axes])
    return ours, ours * (1 + rng.uniform(-unit, unit, size=ours.shape)), 2 * unit * np.abs(ours)


def real(axes="BTNH"):
    if axes == "BNTS":
        keys = POSITIONS[:, None, :]
        return np.broadcast_to(((keys >= 0) & (keys <= POSITIONS[:, :, None]))[:, None], SHAPE[axes])
    return np.broadcast_to((POSITIONS >= 0).reshape(B, T, *[1] * (len(axes) - 2)), SHAPE[axes])


def said(change, axes="BTNH", with_slack=True, **options):
    """Pattern of noisy numbers after a change."""
    ours, theirs, slack = example(axes)
    theirs = change(theirs.copy())
    slack = {"slack": slack} if with_slack else {}
    return pattern(theirs, ours, axes=axes, positions=POSITIONS, where=real(axes), **slack, **options)


def at(index, change):
    """Change of some numbers alone."""

    def changed(x):
        x[index] = change(x[index])
        return x

    return changed


rng = np.random.default_rng(99)
NOISE = rng.normal(size=SHAPE["BTNH"]) * 1e-3
PER_LANE, PER_TOKEN = rng.uniform(0.5, 2, size=H), rng.uniform(0.5, 2, size=(B, T, 1, 1))

PLANTED = {
    "constant factor 0.99985": lambda x: x * 0.99985,
    "constant factor 7.4833": lambda x: x * 7.4833,
    "sign flipped": lambda x: -x,
    "constant offset 0.5": lambda x: x + 0.5,
    "all zero": lambda x: x * 0,
    f"one factor for each lane, {PER_LANE.min():.4g} to {PER_LANE.max():.4g}": lambda x: x * PER_LANE,
    "only odd lanes": at((..., slice(1, None, 2)), lambda x: x + NOISE[..., 1::2]),
    "only even lanes": at((..., slice(0, None, 2)), lambda x: x + NOISE[..., ::2]),
    "only the first half of the lanes": at((..., slice(0, H // 2)), lambda x: x + NOISE[..., : H // 2]),
    "only the second half of the lanes": at((..., slice(H // 2, None)), lambda x: x + NOISE[..., H // 2 :]),
    "only lane 3": at((..., 3), lambda x: x + NOISE[..., 3]),
    "all lanes but 0": at((..., slice(1, None)), lambda x: x + NOISE[..., 1:]),
    "only head 2": at((..., 2, slice(None)), lambda x: x + NOISE[..., 2, :]),
    "only odd heads, constant factor 1.5": at((..., slice(1, None, 2), slice(None)), lambda x: x * 1.5),
    "only row 0": at((0,), lambda x: x + NOISE[0]),
    "only rows that hold padding": at((1,), lambda x: x + NOISE[1]),
    "only the first token": lambda x: x + NOISE * (POSITIONS == 0)[..., None, None],
    "only the last token": at((slice(None), -1), lambda x: x + NOISE[:, -1]),
    "only position 7": lambda x: x + NOISE * (POSITIONS == 7)[..., None, None],
    "from position 9 on": lambda x: x + NOISE * (POSITIONS >= 9)[..., None, None],
    "only up to position 9": lambda x: x + NOISE * (POSITIONS <= 9)[..., None, None],
    "grows with position": lambda x: x + NOISE * (POSITIONS + 1)[..., None, None],
    "shrinks with position": lambda x: x + NOISE * (T - POSITIONS)[..., None, None] ** 2,
    "a single number": at((0, 4, 1, 2), lambda x: x + 1),
    "only head 1, grows with position": at(
        (..., 1, slice(None)), lambda x: x + NOISE[..., 1, :] * (POSITIONS + 1)[..., None]
    ),
    "rounded to bfloat16": lambda x: from_bfloat16(to_bfloat16(x.astype(np.float32))).astype(np.float64),
    "rounded to float16": lambda x: x.astype(np.float16).astype(np.float64),
}


@pytest.mark.parametrize("words", PLANTED)
def test_a_planted_error_is_named(words):
    assert said(PLANTED[words]) == words


@pytest.mark.parametrize(
    "words", [w for w in PLANTED if not w.startswith(("rounded", "a single")) and "with position" not in w]
)
def test_it_is_named_without_bounds_too(words):
    assert said(PLANTED[words], with_slack=False) == words


def test_one_factor_for_each_token():
    # A factor of each token: of "BTD" vectors; for heads it is a factor of each head of each token.
    ours, theirs, slack = example("BTD")
    factor = PER_TOKEN[..., 0]
    got = pattern(theirs * factor, ours, axes="BTD", positions=POSITIONS, where=real("BTD"), slack=slack)
    seen = factor[POSITIONS >= 0]
    assert got == f"one factor for each token, {seen.min():.4g} to {seen.max():.4g}"


def test_neighbours_of_padding():
    beside = np.zeros((B, T), bool)
    beside[1, 5] = True
    middle = POSITIONS.copy()
    middle[0, 10] = -1  # padding between tokens, too
    beside[0, [9, 11]] = True
    ours, theirs, slack = example()
    where = np.broadcast_to((middle >= 0)[..., None, None], ours.shape)
    got = pattern(
        theirs + NOISE * beside[..., None, None], ours, axes="BTNH", positions=middle, where=where, slack=slack
    )
    assert got == "only neighbours of padding"


def test_heads_in_another_order():
    assert (
        said(lambda x: x[..., [0, 2, 1, 3], :]) == "heads in another order: the candidate has the reference's 0 2 1 3"
    )
    assert (
        said(lambda x: x[..., [0, 0, 2, 2], :]) == "heads taken from others: the candidate has the reference's 0 0 2 2"
    )
    assert said(lambda x: x[..., ::-1, :]) == "heads in another order: the candidate has the reference's 3 2 1 0"
    assert said(lambda x: x[..., ::-1]).startswith("lanes in another order: the candidate has the reference's 15 14 13")


def test_scores():
    assert said(lambda x: x * 1.25, "BNTS") == "constant factor 1.25"
    assert said(at((slice(None), 1), lambda x: x + 1), "BNTS") == "only head 1, constant offset 1"


def test_another_tensor():
    ours, theirs, slack = example()
    other = np.random.default_rng(5).normal(size=ours.shape)
    others = {"mlp.gate": other[..., :2], "mlp.up": other}
    got = pattern(other, ours, axes="BTNH", positions=POSITIONS, slack=slack, others=others)
    assert got == "equal to mlp.up"
    assert pattern(theirs, ours, axes="BTNH", positions=POSITIONS, slack=slack, others=others) == ""


def test_numbers_that_are_not_finite():
    ours, theirs, _ = example()
    theirs[0, 3] = np.nan
    words = pattern(theirs, ours, axes="BTNH", positions=POSITIONS, where=real())
    assert words == f"{N * H} of {real().sum()} numbers are not finite, only row 0, only position 3"
    padded = ours.copy()
    padded[1, 0] = np.nan  # padding
    assert pattern(padded, ours, axes="BTNH", positions=POSITIONS, where=real()) == ""


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("axes", SHAPE)
def test_plain_noise_gets_no_words(axes, seed):
    ours, theirs, slack = example(axes, seed)
    where = real(axes)
    assert pattern(theirs, ours, axes=axes, positions=POSITIONS, where=where, slack=slack) == ""
    assert pattern(theirs, ours, axes=axes, positions=POSITIONS, where=where) == ""
    # Noise that is too large everywhere, or here and there, has no pattern either.
    assert pattern(theirs, ours, axes=axes, positions=POSITIONS, where=where, slack=slack / 50) == ""
    assert pattern(theirs, ours, axes=axes, positions=POSITIONS, where=where, slack=slack / 2.1) == ""
    rng = np.random.default_rng(seed)
    sparse = theirs + rng.normal(size=ours.shape) * (rng.random(ours.shape) < 0.05)
    assert pattern(sparse, ours, axes=axes, positions=POSITIONS, where=where, slack=slack) == ""
    assert pattern(ours, ours, axes=axes) == ""
