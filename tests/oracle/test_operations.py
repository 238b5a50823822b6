"""The table of operations against the page of the model: same names, same order, and a bound for every row."""

import numpy as np
import pytest

from refgemma.model import forward
from refgemma.numerics import FLOAT64
from refgemma.oracle import operations
from refgemma.oracle.bounds.arithmetic import arithmetic_of
from refgemma.oracle.bounds.flow import Flow
from refgemma.oracle.bounds.slack import Known
from refgemma.oracle.operations import KINDS, OPERATIONS, names_of, shape_of, sources, weight_of
from tests.models import random_model, widened


def test_the_tap_meets_every_row_in_order_with_its_shape_and_a_bound():
    model = random_model(3)
    params = widened(model.params)
    flow = Flow(params, model.config, arithmetic_of("float32"))
    flow.next_chunk(model.tokens, model.positions)
    seen = []

    def tap(name, value):
        assert value.shape == shape_of(name, model.config, *model.tokens.shape)
        bound = flow.bound_of(name, value)
        assert bound.worst.shape == value.shape
        assert np.all(np.isfinite(bound.worst))
        assert set(sources(name, model.config)) <= set(seen)  # made from what went before
        flow.goes_on_with(name, Known(value))
        seen.append(name)
        return value

    forward(params, model.config, model.tokens, positions=model.positions, numerics=FLOAT64, tap=tap)
    assert seen == names_of(model.config) == names_of(model.config, params)


def test_kinds_and_weights():
    params = random_model(3).params
    assert {row.kind for row in OPERATIONS.values()} == set(KINDS)
    assert weight_of("layers.1.mlp.up", params) is params["layers"][1]["mlp"]["up"]
    assert weight_of("logits", params) is params["head"]
    assert weight_of("layers.1.mlp.act", params) is None


def test_a_layer_has_an_optional_operation_where_its_params_do(monkeypatch):
    model = random_model(3)
    row = OPERATIONS["attn.norm"]._replace(name="attn.post_norm", weight="attn.post_norm", needs="attn.post_norm")
    monkeypatch.setattr(operations, "IN_LAYER", operations.IN_LAYER | {row.name: row})
    first, *rest = model.params["layers"]
    with_it = {**first, "attn": {**first["attn"], "post_norm": first["attn"]["norm"]}}
    names = names_of(model.config, {**model.params, "layers": [with_it, *rest]})
    assert [name for name in names if "post_norm" in name] == ["layers.0.attn.post_norm"]
    assert len([name for name in names_of(model.config) if "post_norm" in name]) == model.config.num_layers


def test_a_row_without_a_bound_is_an_error(monkeypatch):
    model = random_model(3)
    flow = Flow(widened(model.params), model.config, arithmetic_of("float32"))
    flow.goes_on_with("embed", Known(np.zeros((1, 1, model.config.hidden_size))))
    monkeypatch.setitem(OPERATIONS, "attn.norm", OPERATIONS["attn.norm"]._replace(kind="mystery"))
    with pytest.raises(NotImplementedError, match="'mystery' has no bound"):
        flow.bound_of("layers.0.attn.norm", np.zeros((1, 1, model.config.hidden_size)))
