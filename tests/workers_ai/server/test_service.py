"""The error that a client gets when an engine fails."""

import numpy as np
import pytest

import refgemma
from refgemma.batching import Closed, Full
from refgemma.lora import find_adapter
from refgemma.workers_ai.pages import GEMMA_2B
from refgemma.workers_ai.server.app import create_app
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import RUN, ask, serving


@pytest.fixture
def service():
    return create_app({GEMMA_2B: tiny_it()}, {}).state.service


def test_a_dead_engine_is_not_a_stopping_server(service):
    """Both close an engine; only the second is by intent, and nothing to look for in a log."""
    died = Closed("the worker of this engine died: SystemError: planted")
    assert service.failure(died).code == 3043
    service.close(0)
    assert service.failure(died).code == 3008


def test_a_full_engine_and_the_unexpected(service, caplog):
    assert service.failure(Full("planted")).code == 3040
    assert not caplog.records
    assert service.failure(KeyError("planted")).code == 3043
    assert "planted" in caplog.text


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("stream", [False, True])
def test_a_finetune_whose_numbers_overflow_is_to_blame(stream):
    """One that is given with the server is not tried out first, as an upload is."""
    adapter = refgemma.lora.read(find_adapter("pirate"))
    for parts in adapter.modules.values():
        parts["lora_magnitude_vector"] = np.full_like(parts["lora_magnitude_vector"], 3e38)
    with serving(create_app({GEMMA_2B: tiny_it()}, {"mine": adapter})) as address:
        answer = ask(address, RUN, {"prompt": "Who are you?", "lora": "mine", "stream": stream})
        text = answer.body.decode()
        assert "5006" in text
        assert "Finetune mine makes numbers that overflow" in text
        assert ask(address, RUN, {"prompt": "Who are you?", "max_tokens": 2}).status == 200
