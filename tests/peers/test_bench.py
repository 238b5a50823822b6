"""The other side of `refgemma bench`: transformers loads the random weights and prints every measure, twice."""

import pytest

from refgemma.bench.engines import ATTENTIONS, DECODE
from refgemma.bench.run import Job, _process, make
from tests.bench.conftest import CONFIG


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_prints_every_measure(tmp_path, dtype):
    folder = make(tmp_path / "small", CONFIG)
    job = Job("transformers", dtype)
    seen = []
    outcome = _process(job, folder, 120, seen.append)
    assert outcome.failure == ""
    each = ["prefill_128", *DECODE, "prefill_2048", "memory"]
    assert [line["measure"] for line in outcome.lines] == ["about", "load", "first_token", *each, *each]
    assert [line["variant"] for line in outcome.lines[3:]] == [name for name in ATTENTIONS for _ in each]
    assert seen[-1] == job.measures
