"""Codes, statuses and envelopes."""

import copy
import json
import pickle

import pytest

from refgemma.workers_ai import AiError
from refgemma.workers_ai.errors import CODES

NOT_MET = "oneOf at '/' not met, 0 matches: required properties at '/' are 'prompt'"


def test_bad_input_reads_as_the_service_words_it():
    error = AiError(5006, NOT_MET)
    assert (error.code, error.status) == (5006, 400)
    assert str(error) == f"5006: Error: {NOT_MET}"  # what a binding throws, behind the name AiError
    assert json.dumps(error.envelope()) == json.dumps(
        {
            "errors": [{"message": f"AiError: Bad input: Error: {NOT_MET}", "code": 5006}],
            "success": False,
            "result": {},
            "messages": [],
        }
    )


def test_an_unknown_finetune_reads_as_it_was_reported():
    error = AiError(3037, "Finetune 0 not found")
    assert error.envelope()["errors"] == [{"message": "AiError: AiError: Finetune 0 not found", "code": 3037}]
    assert (error.status, error.description) == (404, "Finetune 0 not found")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        *((code, 400) for code in (3003, 3039, 5004, 5006, 5007, 5024)),
        *((code, 403) for code in (3023, 3041, 5016, 5018)),
        *((code, 404) for code in (3037, 3042)),
        *((code, 405) for code in (5005, 5019)),
        *((code, 408) for code in (3007, 3008)),
        *((code, 413) for code in (3006,)),
        *((code, 429) for code in (3036, 3040)),
        *((code, 500) for code in (3043,)),
    ],
)
def test_statuses(code, status):
    assert AiError(code, "x").status == status
    assert CODES[code].meaning


def test_line_breaks_in_quotations_are_escaped():
    assert str(AiError(3037, "Finetune a\r\nb not found")) == "3037: Finetune a\\r\\nb not found"


def test_errors_travel():
    error = AiError(5006, "x")
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (other.code, other.message, str(other)) == (5006, "x", "5006: Error: x")
