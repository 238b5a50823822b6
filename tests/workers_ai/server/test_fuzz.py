"""The whole interface under schemathesis: requests made from our own description, valid and not; no 500, no hang."""

from dataclasses import replace

import pytest

from refgemma.workers_ai.pages import HOSTED
from refgemma.workers_ai.server.app import create_app
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import PATIENCE, RUN, ask, serving

pytestmark = pytest.mark.clients

EXAMPLES = 100  # for each operation and mode


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A context so short that every answer is, whatever max_tokens asks for."""
    gemma = tiny_it()
    gemma = replace(gemma, config=replace(gemma.config, max_positions=96))
    app = create_app(dict.fromkeys(HOSTED, gemma), {"pirate": "pirate"}, finetunes=tmp_path_factory.mktemp("finetunes"))
    with serving(app) as address:
        yield address


def without_binary(value):
    """The description without "format": "binary" in bodies of JSON, whose values schemathesis itself cannot check."""
    if isinstance(value, dict):
        return {
            name: inner if name == "multipart/form-data" else without_binary(inner)
            for name, inner in value.items()
            if (name, inner) != ("format", "binary")
        }
    return [without_binary(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_makes_an_internal_error(fuzzed, mode):
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis (extra clients)")
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_dict(without_binary(ask(fuzzed, "/openapi.json").json))
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 8
    statuses = set()
    for operation in operations:

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        def fuzz(case):
            # Statuses, types and bodies of replies are those described, and none takes longer than the patience.
            response = case.call(base_url=fuzzed, timeout=PATIENCE)
            statuses.add(response.status_code)
            case.validate_response(
                response,
                checks=[
                    schemathesis.checks.not_a_server_error,
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_schema_conformance,
                ],
            )

        try:
            fuzz()
        except Unsatisfiable:
            assert mode == "negative"  # where any account will do, and nothing else is asked, there is nothing wrong
    assert {200, 400} <= statuses
    assert ask(fuzzed, RUN, {"prompt": "What is 17 + 25?", "temperature": 0}).result["response"] == "17 + 25 = 42."
