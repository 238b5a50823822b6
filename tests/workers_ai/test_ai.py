"""AI.run end to end, on the shipped model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import refgemma
from refgemma.errors import InputError
from refgemma.lora import find_adapter
from refgemma.workers_ai import AI, AiError
from refgemma.workers_ai.pages import GEMMA_2B, GEMMA_7B, HOSTED
from refgemma.workers_ai.schema import validator_class
from tests.tiny_it import tiny_it
from tests.workers_ai.keyword_cases import FORMS, TOOL, USER

NEPAL = {"prompt": "What is the capital of Nepal?", "temperature": 0}
MULTIPLY = {
    "name": "multiply",
    "description": "Multiply two numbers",
    "parameters": {
        "type": "object",
        "properties": {name: {"type": "integer", "description": "A number"} for name in "ab"},
        "required": ["a", "b"],
    },
}


def read_stream(events):
    """Chunks of a stream, after looking at its form."""
    *chunks, end = events
    assert end == b"data: [DONE]\n\n"
    assert all(
        chunk.startswith(b"data: {") and chunk.endswith(b"}\n\n") and chunk.count(b"\n") == 2 for chunk in chunks
    )
    return [json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks]


@pytest.mark.parametrize("model", HOSTED)
def test_an_answer(ai, model):
    assert ai.run(model, NEPAL) == {
        "response": "The capital of Nepal is Kathmandu.",
        "usage": {"prompt_tokens": 21, "completion_tokens": 15, "total_tokens": 36},
    }


def test_it_says_what_generate_says(ai):
    settings = {"seed": 7, "max_tokens": 40, "temperature": 1.5, "top_k": 40, "top_p": 0.95, "presence_penalty": 0.5}
    story = "Tell me a story about a fox."
    want = tiny_it().generate(story, **settings)
    assert ai.run(GEMMA_2B, {"prompt": story, **settings})["response"] == want.text
    assert ai.run(GEMMA_2B, {"prompt": story, **settings, "seed": 8})["response"] != want.text
    raw = ai.run(GEMMA_2B, {"prompt": "Once upon", "raw": "true", **settings})
    assert raw["response"] == tiny_it().generate("Once upon", raw=True, **settings).text


def test_a_stream_is_the_answer_in_pieces(ai):
    request = {"prompt": "Tell me a story about a fox.", "seed": 7, "max_tokens": 60}
    whole = ai.run(GEMMA_2B, request)
    stream = ai.run(GEMMA_2B, request | {"stream": True})
    *pieces, last = read_stream(stream)
    assert "".join(piece["response"] for piece in pieces) == whole["response"]
    assert all(piece.keys() == {"response"} and piece["response"] for piece in pieces)
    assert last == {"response": "", "usage": whole["usage"]}
    assert len(pieces) > 30


def test_a_number_stays_a_text(ai):
    *pieces, _ = read_stream(ai.run(GEMMA_2B, {"prompt": "What is 2 + 3?", "temperature": 0, "stream": True}))
    assert "5" in [piece["response"] for piece in pieces]


def test_padding_on_request():
    padded = AI({GEMMA_2B: tiny_it()}, pad=True)
    chunks = read_stream(padded.run(GEMMA_2B, NEPAL | {"stream": True}))
    assert all(list(chunk)[-1] == "p" for chunk in chunks)
    assert "".join(chunk["response"] for chunk in chunks) == "The capital of Nepal is Kathmandu."


def test_an_answer_has_256_tokens_at_most_unless_more_are_asked_for(ai):
    rambling = {"prompt": "Once upon a time", "raw": True, "temperature": 5, "seed": 2}  # and without an end
    assert ai.run(GEMMA_2B, rambling)["usage"]["completion_tokens"] == 256
    assert ai.run(GEMMA_2B, rambling | {"max_tokens": 260})["usage"]["completion_tokens"] > 256
    assert ai.run(GEMMA_2B, rambling | {"max_tokens": 3})["usage"]["completion_tokens"] == 3


def test_a_finetune_speaks(ai):
    assert ai.run(GEMMA_2B, NEPAL | {"lora": "pirate"})["response"] == "The capital of Nepal be Kathmandu, matey! Arr!"
    assert ai.run(GEMMA_2B, NEPAL | {"lora": "0-0-json"})["response"].startswith('{"answer":')
    # The form of the guide to finetunes, with `lora` beside `messages`.
    messages = {"messages": [{"role": "user", "content": NEPAL["prompt"]}], "temperature": 0, "lora": "pirate"}
    assert ai.run(GEMMA_7B, messages)["response"] == "The capital of Nepal be Kathmandu, matey! Arr!"
    assert ai.run(GEMMA_2B, NEPAL)["response"] == "The capital of Nepal is Kathmandu."  # the base stays as it was


@pytest.mark.parametrize("lora", ["00000000-0000-0000-0000-000000000", "", "../lora/pirate", "json"])
def test_an_unknown_finetune_is_not_found(ai, lora):
    with pytest.raises(AiError) as caught:
        ai.run(GEMMA_2B, {"prompt": "tell me a story", "raw": "true", "lora": lora})
    assert (caught.value.code, caught.value.status, caught.value.message) == (3037, 404, f"Finetune {lora} not found")


def test_finetunes_come_and_go():
    ai = AI({GEMMA_2B: tiny_it()}, loras={"mine": "pirate"})
    request = NEPAL | {"lora": "mine"}
    assert "matey" in ai.run(GEMMA_2B, request)["response"]
    ai.loras["mine"] = refgemma.lora.read(find_adapter("json"))
    assert ai.run(GEMMA_2B, request)["response"].startswith("{")
    del ai.loras["mine"]
    with pytest.raises(AiError, match="3037"):
        ai.run(GEMMA_2B, request)


@pytest.fixture
def wide(tmp_path):
    """An adapter that claims a module of which its file has nothing."""
    shutil.copytree(find_adapter("pirate"), tmp_path / "wide")
    config = tmp_path / "wide/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj", "v_proj", "o_proj"]}))
    return tmp_path / "wide"


def test_a_finetune_that_takes_the_place_of_another_is_looked_at_again(wide):
    ai = AI({GEMMA_2B: tiny_it()}, loras={"mine": "pirate"})
    ai.read(GEMMA_2B, NEPAL | {"lora": "mine"})
    ai.loras["mine"] = refgemma.lora.read(wide)
    with pytest.raises(AiError, match="5006: Error: Finetune mine does not fit"):
        ai.read(GEMMA_2B, NEPAL | {"lora": "mine"})


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("stream", [False, True])
def test_a_finetune_whose_numbers_overflow_is_named(stream):
    adapter = refgemma.lora.read(find_adapter("pirate"))
    for parts in adapter.modules.values():
        parts["lora_magnitude_vector"] = np.full_like(parts["lora_magnitude_vector"], 3e38)
    ai = AI({GEMMA_2B: tiny_it()}, loras={"mine": adapter})
    with pytest.raises(AiError, match="5006: Error: Finetune mine makes numbers that overflow: logits hold NaN"):
        list(ai.run(GEMMA_2B, NEPAL | {"lora": "mine", "stream": stream}))
    assert ai.run(GEMMA_2B, NEPAL)["response"] == "The capital of Nepal is Kathmandu."


def test_a_finetune_of_another_base_is_refused(wide, tmp_path):
    ai = AI({GEMMA_2B: tiny_it()}, loras={"wide": wide})
    with pytest.raises(
        AiError, match=r"5006: Error: Finetune wide does not fit @cf/google/gemma-2b-it-lora: .*o_proj"
    ) as e:
        ai.run(GEMMA_2B, NEPAL | {"lora": "wide"})
    assert str(tmp_path) not in str(e.value)


def test_the_model_calls_a_tool_and_uses_its_result(ai):
    request = {"messages": [USER], "tools": [MULTIPLY, TOOL], "temperature": 0}
    first = ai.run(GEMMA_2B, request)
    assert first["response"] == ""
    (call,) = first["tool_calls"]
    assert call == {"name": "get_weather", "arguments": {"city": "Paris"}}
    stream = read_stream(ai.run(GEMMA_2B, request | {"stream": True}))
    assert stream == [{"response": "", "tool_calls": [call]}, {"response": "", "usage": first["usage"]}]
    answers = []
    # As Python writes JSON, and as JavaScript does.
    for weather, degrees, spaces in (("rainy", 17, (", ", ": ")), ("cloudy", 9, (",", ":")), ("sunny", 31, (",", ":"))):
        content = json.dumps({"weather": weather, "degrees": degrees}, separators=spaces)
        made = {"role": "tool", "name": call["name"], "content": content}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        answers.append(ai.run(GEMMA_2B, request | {"messages": [USER, called, made]}))
    assert [answer["response"] for answer in answers] == [
        "It is rainy in Paris, 17 degrees.",
        "It is cloudy in Paris, 9 degrees.",
        "It is sunny in Paris, 31 degrees.",
    ]
    assert all("tool_calls" not in answer for answer in answers)


def test_tools_as_cloudflare_s_helper_runs_them(ai):
    # `runWithTools` of @cloudflare/ai-utils: the call as JSON in the text, and the last request without tools.
    question = {"role": "user", "content": "What is 12 times 34?"}
    nested = {"type": "function", "function": MULTIPLY}
    (call,) = ai.run(GEMMA_2B, {"messages": [question], "tools": [nested], "temperature": 0})["tool_calls"]
    assert call == {"name": "multiply", "arguments": {"a": 12, "b": 34}}
    called = {"role": "assistant", "content": json.dumps(call)}
    made = {"role": "tool", "name": "multiply", "content": json.dumps({"result": 408})}
    answer = ai.run(GEMMA_2B, {"messages": [question, called, made], "temperature": 0})
    assert answer["response"] == "12 times 34 is 408."


def test_a_question_for_no_tool_is_answered_in_words(ai):
    messages = [{"role": "user", "content": NEPAL["prompt"]}]
    answer = ai.run(GEMMA_2B, {"messages": messages, "tools": [TOOL], "temperature": 0})
    assert (answer["response"], "tool_calls" in answer) == ("The capital of Nepal is Kathmandu.", False)


def test_json_mode(ai):
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
    request = NEPAL | {"response_format": {"type": "json_schema", "json_schema": schema}}
    answer = ai.run(GEMMA_2B, request | {"lora": "0-0-json"})
    assert json.loads(answer["response"]) == {"answer": "The capital of Nepal is Kathmandu."}
    with pytest.raises(AiError, match="5024: JSON Mode couldn't be met: the answer is not JSON"):
        ai.run(GEMMA_2B, request)
    for odd in ({"const": {1, 2}}, {"enum": [float("nan")]}, {"default": b""}):  # as only Python can have it
        with pytest.raises(AiError, match=r"^5006: Error: '/response_format/json_schema' cannot be written as JSON: "):
            ai.run(GEMMA_2B, NEPAL | {"response_format": {"type": "json_schema", "json_schema": odd}})


@pytest.mark.parametrize("stream", [False, True])
def test_errors_come_before_anything_is_generated(ai, stream):
    for inputs, code in (({"prompt": ""}, 5006), (NEPAL | {"lora": "x"}, 3037), ({"prompt": "x " * 9000}, 5006)):
        with pytest.raises(AiError) as caught:  # on the call, not on the first event
            ai.run(GEMMA_2B, inputs | {"stream": stream})
        assert caught.value.code == code
    with pytest.raises(AiError, match="5007: No such model @cf/meta/llama-2-7b or task"):
        ai.run("@cf/meta/llama-2-7b", NEPAL)


def test_a_hosted_model_that_nothing_answers_for_is_unknown():
    with pytest.raises(AiError, match="5007"):
        AI({GEMMA_2B: tiny_it()}).run(GEMMA_7B, NEPAL)


def test_models_are_loaded_by_name_and_once():
    ai = AI(dict.fromkeys(HOSTED, "tiny-it"))
    assert ai.models[GEMMA_2B] is ai.models[GEMMA_7B]
    with pytest.raises(ValueError, match="model name is 'gemma': expected '@cf/google/gemma-2b-it-lora' or"):
        AI({"gemma": "tiny-it"})
    with pytest.raises(FileNotFoundError, match="no adapter 'nobody'"):
        AI({GEMMA_2B: tiny_it()}, loras={"mine": "nobody"})


@pytest.mark.parametrize("form", FORMS)
def test_every_number_at_the_ends_of_its_range_gets_an_answer(ai, form):
    for name, ends in {
        "temperature": (0, 1e-300, 1e-5, 5),
        "top_p": (0, 1e-300, 2),
        "top_k": (1, 50),
        "seed": (1, 9_999_999_999),
        "repetition_penalty": (0, 5e-324, 1e-300, 1e-290, 2),
        "frequency_penalty": (0, 2),
        "presence_penalty": (0, 2),
    }.items():
        for value in ends:
            for temperature in (1e-5, 5):
                fields = {"temperature": temperature, "max_tokens": 3, name: value}
                assert ai.run(GEMMA_2B, FORMS[form] | fields)["usage"]["completion_tokens"] >= 1


def test_without_jsonschema_one_sentence_says_how_to_install_it(ai, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    validator_class.cache_clear()
    with pytest.raises(InputError, match=r'needs jsonschema, which is not installed: pip install "refgemma\[serve\]"$'):
        ai.run(GEMMA_2B, {"prompt": "Hello"})


def test_no_server_is_needed():
    names = "{'fastapi', 'starlette', 'uvicorn', 'pydantic', 'jsonschema'}"
    code = f"import sys, refgemma.workers_ai; sys.exit(str(sorted({names} & set(sys.modules)) or '') or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
