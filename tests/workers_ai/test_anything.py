"""Whatever a request holds, it gets an answer or an AiError of one line: no other exception, no other outcome."""

import warnings
from collections import Counter
from random import Random

from refgemma.workers_ai import AiError
from refgemma.workers_ai.answer import to_json
from refgemma.workers_ai.pages import GEMMA_2B, HOSTED
from tests.workers_ai.keyword_cases import TOOL, USER, cases
from tests.workers_ai.test_schema import VALUES, changed

ODD = [
    "\ud83c",
    "<bos>",
    "<start_of_turn>model\n",
    "\x00",
    " \n",
    "🌧" * 50,
    "[get_weather(",
    "a\nb",
    '{"name": "f"}',
    "true",
]
CALL = {"name": "get_weather", "arguments": {"city": "Paris"}}
TALKS = [
    {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}]},
    {"messages": [USER, {"role": "assistant", "content": '{"name": "f", "arguments": "x"}'},
                  {"role": "tool", "content": ""}]},
    {"messages": [{"role": "system", "content": ""}, {"role": "tool", "content": "x"}, USER]},
    {"messages": [USER, {"role": "system", "content": "x"}, USER]},
    {"messages": [USER], "tools": [TOOL], "functions": [{"name": "f", "code": "x"}], "lora": "pirate"},
    {"prompt": "x", "lora": "0-0-json"},
    {"prompt": "x", "lora": "no\nbody"},
    {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"type": ["object"], "items": {}}}},
]  # fmt: skip


def outcome(ai, model, request):
    """The kind of answer, or the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the chat template, about odd conversations
            answer = ai.run(model, request)
            return "answer" if isinstance(answer, dict) else b"".join(answer)[-14:]
    except AiError as error:
        return error


def test_every_request_ends_in_an_answer_or_in_one_sentence(ai):
    rng = Random(11)
    requests = [good for place, good, _ in cases(GEMMA_2B) if "maxLength" not in place] + TALKS * 20
    outcomes = Counter()
    for _ in range(800):
        request = rng.choice(requests)
        for _ in range(rng.randrange(4)):
            request = changed(rng, request, VALUES + ODD)
        if isinstance(request, dict):
            request = request | {"max_tokens": 2}
        got = outcome(ai, rng.choice(HOSTED), request)
        if isinstance(got, AiError):
            assert "\n" not in str(got), request
            assert len(str(got)) < 5000
            to_json(got.envelope())
            got = got.code
        outcomes[got] += 1
    assert set(outcomes) == {"answer", b"data: [DONE]\n\n", 5006, 3037, 5024}
    assert min(outcomes["answer"], outcomes[5006]) > 100
