"""Axes told by their sizes, on arrays whose every number says where it belongs."""

from itertools import permutations

import numpy as np
import pytest

from refgemma.oracle.foreign.axes import arrange, changes, layouts, parts

SIZES = {"B": 2, "T": 5, "S": 5, "N": 6, "K": 3, "H": 4, "D": 7, "F": 11, "V": 13}
AXES = ["BTD", "BTNH", "BTKH", "BTF", "BTV"]


def numbered(axes, sizes=SIZES):
    shape = [sizes[c] for c in axes]
    return np.arange(np.prod(shape)).reshape(shape)


@pytest.mark.parametrize("axes", AXES)
def test_axes_in_any_order(axes):
    want = numbered(axes)
    for order in permutations(range(len(axes))):
        moved = want.transpose(order)
        (layout,) = layouts(moved.shape, axes, SIZES)
        assert np.array_equal(arrange(moved, layout, axes, SIZES), want)
        assert bool(changes(layout, axes)) == (order != tuple(range(len(axes))))


@pytest.mark.parametrize("axes", ["BTNH", "BTKH"])
def test_heads_joined_with_their_width(axes):
    want = numbered(axes)
    joined = want.reshape(2, 5, -1)
    for order in permutations(range(3)):
        moved = joined.transpose(order)
        (layout,) = layouts(moved.shape, axes, SIZES)
        assert np.array_equal(arrange(moved, layout, axes, SIZES), want)
        assert "heads split" in changes(layout, axes)


@pytest.mark.parametrize("axes", [*AXES, "BNTS"])
def test_one_row_without_its_axis(axes):
    sizes = SIZES | {"B": 1}
    want = numbered(axes, sizes)
    (layout,) = layouts(want[0].shape, axes, sizes)
    assert np.array_equal(arrange(want[0], layout, axes, sizes), want)
    assert "B added" in changes(layout, axes)
    assert layouts(want[0].shape, axes, SIZES) == []  # two rows cannot lack it


def test_the_last_position_without_its_axis():
    sizes = SIZES | {"T": 1}
    want = numbered("BTV", sizes)
    (layout,) = layouts((2, 13), "BTV", sizes)
    assert np.array_equal(arrange(want[:, 0], layout, "BTV", sizes), want)
    probs = numbered("BNTS", sizes)
    (layout,) = layouts((2, 6, 5), "BNTS", sizes)
    assert np.array_equal(arrange(probs[:, :, 0], layout, "BNTS", sizes), probs)


def test_queries_come_before_keys():
    want = numbered("BNTS")
    (layout,) = layouts(want.shape, "BNTS", SIZES)
    assert np.array_equal(arrange(want, layout, "BNTS", SIZES), want)
    flax = want.swapaxes(1, 2)  # BTNS
    (layout,) = layouts(flax.shape, "BNTS", SIZES)
    assert np.array_equal(arrange(flax, layout, "BNTS", SIZES), want)


def test_sizes_that_coincide_leave_it_open_our_order_first():
    sizes = SIZES | {"T": 6}
    options = layouts((2, 6, 6, 4), "BTNH", sizes)
    assert options == [("B", "T", "N", "H"), ("B", "N", "T", "H")]
    # Where an axis of one entry stands makes no difference, so that is no second way.
    assert len(layouts((1, 5, 1, 4), "BTKH", SIZES | {"B": 1, "K": 1})) == 1


def test_what_does_not_fit():
    for shape in [(2, 5, 8), (2, 5), (5, 7), (2, 5, 6, 5), (), (2, 5, 7, 1)]:
        assert layouts(shape, "BTD", SIZES) == []


def test_said_in_words():
    assert changes(("B", "T", "D"), "BTD") == ""
    assert changes(("B", "N", "T", "H"), "BTNH") == "axes transposed: B N T H read as B T N H"
    assert changes(("T", "NH"), "BTNH") == "B added, heads split: T (N H) read as B T N H"


def test_parts_side_by_side_and_stacked():
    q, k, v = (numbered(axes) + 1000 * i for i, axes in enumerate(["BTNH", "BTKH", "BTKH"]))
    side_by_side = np.concatenate([x.reshape(2, 5, -1) for x in (q, k, v)], axis=-1)
    found = parts(side_by_side.shape, ["BTNH", "BTKH", "BTKH"], SIZES)
    for part, want in zip(found, (q, k, v), strict=True):
        assert np.array_equal(side_by_side[part].reshape(want.shape), want)
    stacked = np.stack([k, v])
    found = parts(stacked.shape, ["BTKH", "BTKH"], SIZES)
    assert [np.array_equal(stacked[part], want) for part, want in zip(found, (k, v), strict=True)] == [True, True]
    gate, up = numbered("BTF"), numbered("BTF") + 1000
    in_between = np.stack([gate, up], axis=2)  # B T 2 F
    found = parts(in_between.shape, ["BTF", "BTF"], SIZES)
    assert [np.array_equal(in_between[p], want) for p, want in zip(found, (gate, up), strict=True)] == [True, True]
    assert parts((2, 5, 23), ["BTF", "BTF"], SIZES) == []
    assert parts((3, 2, 5, 3, 4), ["BTKH", "BTKH"], SIZES) == []
