"""The other side of `refgemma bench`: transformers loads the random weights and tells every measure, twice."""

import pytest

from refgemma.bench import plan
from refgemma.bench.peer import ATTENTIONS
from refgemma.bench.run import Job, _process
from refgemma.bench.weights import make
from tests.bench.conftest import CONFIG


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_tells_every_measure(tmp_path, dtype):
    folder = make(tmp_path / "small", CONFIG)
    job = Job("transformers", dtype)
    seen = []
    told = _process(job, folder, 120, seen.append)
    assert told.failure == ""
    each = ["prefill_128", *plan.DECODE, "prefill_2048", "memory"]
    assert [line["measure"] for line in told.lines] == ["about", "load", "first_token", *each, *each]
    assert [line["variant"] for line in told.lines[3:]] == [name for name in ATTENTIONS for _ in each]
    assert seen[-1] == job.measures
