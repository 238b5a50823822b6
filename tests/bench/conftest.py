"""A checkpoint so small that every measure of it is a moment's work, and one run of the whole."""

import json
from types import SimpleNamespace

import pytest

from refgemma.bench.run import SHAPES, make
from refgemma.cli import bench, main
from refgemma.config import Config

# No two widths agree, K is neither 1 nor N, and every width is even, as bfloat16 pairs want it.
CONFIG = Config.uniform(
    vocab_size=96,
    hidden_size=40,
    intermediate_size=72,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    max_positions=640,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    query_scale=12**-0.5,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="session")
def config():
    return CONFIG


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("bench") / "small", CONFIG)


@pytest.fixture(scope="session")
def whole_run():
    """One run of the command for the small model: rounds, progress, and what --json printed."""
    seen, printed, rounds = [], [], []
    run_rounds = bench.run_rounds

    def spy(folder, *, progress, **options):
        rounds.extend(run_rounds(folder, progress=lambda *at: seen.append(at), **options))
        return rounds

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "tiny", CONFIG)
        patch.setattr(bench, "run_rounds", spy)
        patch.setattr(bench, "print_json", printed.append)
        assert main(["bench", "--size", "tiny", "--no-peers", "--rounds", "1", "--json"]) == 0
    return SimpleNamespace(rounds=rounds, seen=seen, printed=json.loads(json.dumps(printed[0])))


@pytest.fixture
def found(whole_run):
    """What --json printed."""
    return whole_run.printed
