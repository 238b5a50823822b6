"""Random adapters with PEFT's answers, drawn once for all files."""

import pytest

from tests.peers.peft_cases import CASES, draw_case

# Hold no tests and import torch or jax, which the default run must not need (doctest collection imports every file).
collect_ignore = [
    *("eager.py", "honest.py", "peft_side.py", "planted.py", "planted_somewhere.py"),
    *("recorded.py", "recorded_deepmind.py"),
]


@pytest.fixture(scope="session")
def peft_cases(tmp_path_factory):
    """All cases; PEFT has every tensor of each folder in memory as it stands there."""
    pytest.importorskip("peft", reason="needs torch, transformers and peft: pip install refgemma[peers]")
    folder = tmp_path_factory.mktemp("peft")
    return [draw_case(seed, folder / str(seed)) for seed in range(CASES)]
