"""THEORY.md against the code: a derivation for each bound, each constant with its value, each rounding point."""

import re
from pathlib import Path

import pytest

import refgemma.oracle
from refgemma.oracle import thresholds
from refgemma.oracle.bounds import elementwise, products, sums
from refgemma.oracle.operations import KINDS
from refgemma.profiles import ROUNDINGS

THEORY = (Path(refgemma.oracle.__file__).parent / "THEORY.md").read_text(encoding="utf-8")
POINT = re.compile(r"at\(([a-z_]+\.[a-z_]+|[a-z]+)\)")


@pytest.mark.parametrize("kind", KINDS)
def test_each_bound_is_derived_under_its_name(kind):
    assert f"\n### `{kind}`\n" in THEORY
    assert any(callable(getattr(module, kind, None)) for module in (elementwise, products, sums))


@pytest.mark.parametrize("name", [name for name in dir(thresholds) if name.isupper()])
def test_each_constant_is_listed_with_its_value(name):
    assert f"| `{name}` | {getattr(thresholds, name)} | " in THEORY


@pytest.mark.parametrize("name", ["gamma", "compound", "chance_of_sum", "swallowed", "swallowed_by_one"])
def test_sums_are_explained(name):
    assert f"**`{name}(" in THEORY
    assert callable(getattr(sums, name))


def test_rounding_points_are_those_of_the_profiles():
    named = set(POINT.findall(THEORY)) - {"p"}
    assert len(named) > 25
    assert named <= set(ROUNDINGS)
