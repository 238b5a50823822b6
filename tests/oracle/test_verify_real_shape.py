"""`refgemma verify` on a checkpoint of gemma-2b's shape with random weights: 5 GB on disk, minutes. Marked `slow`."""

import json
import tracemalloc

import pytest

from refgemma.checkpoint.doctor import examine
from refgemma.cli import main
from refgemma.oracle.published.figures import figures_of
from tests.test_real_shape import folder  # noqa: F401

# Of NumPy's own arrays, weights stay mapped: 64 rows of 256,000 logits in float32 once and in float64 four times are
# 0.6 GB, and a chunk of the prompt, its keys and its MLP rows a tenth of that.
MOST = 10**9  # bytes


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gemma-2b", "gemma-2b-it"])
def test_every_figure_is_computed_and_differs(folder, capsys, model):  # noqa: F811
    tracemalloc.start()
    try:
        code = main(["verify", str(folder), "--as", model, "--json"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    shown = json.loads(capsys.readouterr().out)
    assert code == 1
    assert [figure["id"] for figure in shown["figures"]] == [figure.id for figure in figures_of(model)]
    assert {figure["verdict"] for figure in shown["figures"]} == {"differs"}
    assert all(figure["ours"] is not None and figure["problem"] for figure in shown["figures"])
    assert shown["num_parameters"] == 2_506_172_416
    assert shown["candidates"] == ["gemma-2b", "gemma-2b-it", "gemma-1.1-2b-it"]
    assert peak < MOST


@pytest.mark.slow
def test_the_doctor_knows_the_shape(folder):  # noqa: F811
    remarks = examine(folder)
    assert {remark.grade for remark in remarks} == {"fine"}
    assert "Gemma 1 by the norms of its layers, the size of gemma-2b, 2,506,172,416 numbers" in remarks[0].what
