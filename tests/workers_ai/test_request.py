"""What each field of a request means here: the mapping to SamplingParams, and the rules beyond the schema."""

import pytest

from refgemma import SamplingParams
from refgemma.workers_ai import AiError, read
from refgemma.workers_ai.pages import GEMMA_2B, GEMMA_7B, HOSTED
from refgemma.workers_ai.request import DEEPEST
from tests.workers_ai.keyword_cases import FORMS, TOOL, USER

TEXT = {"prompt": "Hello"}
both_models = pytest.mark.parametrize("model", HOSTED)
both_forms = pytest.mark.parametrize("form", FORMS)


def refused(model, inputs, match, code=5006):
    with pytest.raises(AiError, match=match) as caught:
        read(model, inputs)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


@both_models
@both_forms
def test_defaults(model, form):
    request = read(model, FORMS[form])
    assert request.params == SamplingParams(temperature=0.6, max_tokens=256)  # also on 7B, whose page has none
    assert (request.model, request.stream, request.lora, request.raw) == (model, False, None, None)


@both_models
@both_forms
def test_settings_are_taken_over(model, form):
    given = {
        "temperature": 4.5,
        "top_k": 50.0,
        "top_p": 0.9,
        "seed": 9_999_999_999,
        "repetition_penalty": 0.5,
        "frequency_penalty": 2,
        "presence_penalty": 0.25,
        "max_tokens": 3.0,
    }
    want = given | {"top_k": 50, "max_tokens": 3}
    assert read(model, FORMS[form] | given).params == SamplingParams(**want)


def test_values_without_a_meaning_of_their_own():
    def params(**fields):
        return read(GEMMA_2B, TEXT | fields).params

    assert params(temperature=0).temperature == 0
    assert params(top_p=1.7).top_p == 1
    assert params(top_p=0).top_p == 0
    assert params(repetition_penalty=0).repetition_penalty == 1
    assert params(repetition_penalty=1e-310).repetition_penalty == 1  # a logit divided by it is infinite
    assert params(repetition_penalty=0.01).repetition_penalty == 0.01
    assert params(max_tokens=10**30).max_tokens == 10**30  # cut to the context when the prompt is known


@both_models
@both_forms
@pytest.mark.parametrize("tokens", [0, -1, -(10**30)])
def test_fewer_than_one_token_are_refused(model, form, tokens):
    refused(model, FORMS[form] | {"max_tokens": tokens}, "'/max_tokens' must be >= 1")


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty", "presence_penalty"])
def test_nan_and_infinity_are_refused(name):
    # A NaN is neither below a minimum nor above a maximum, and must be refused all the same.
    refused(GEMMA_2B, TEXT | {name: float("nan")}, f"'/{name}' must be >= 0")
    refused(GEMMA_2B, TEXT | {name: float("inf")}, f"'/{name}' must be <= ")


def test_a_prompt_is_one_user_turn():
    assert read(GEMMA_2B, TEXT).messages == ({"role": "user", "content": "Hello"},)


@both_models
def test_raw_takes_texts_unchanged(model):
    text = "<start_of_turn>user\n Hi <end_of_turn>"
    assert read(model, {"prompt": text, "raw": True}).raw == text
    messages = [{"role": "anyone", "content": " a "}, {"role": "system", "content": "b"}]
    request = read(model, {"messages": messages, "raw": True})
    assert (request.raw, request.messages) == (" a b", ())
    assert read(model, TEXT | {"raw": False}).raw is None


@both_models
@both_forms
def test_raw_as_the_curl_example_writes_it(model, form):
    assert read(model, FORMS[form] | {"raw": "true"}).raw is not None
    for other in ("false", "True", "yes", "1", "", 1, None):
        refused(model, FORMS[form] | {"raw": other}, "Type mismatch of '/raw'")


def test_prompt_and_messages_exclude_each_other():
    for messages in ([USER], [], 5):  # with the last, the schema alone would find one branch that fits
        refused(GEMMA_2B, {"prompt": "x", "messages": messages}, "2 matches")


@both_models
@both_forms
def test_lora_counts_in_both_forms(model, form):
    assert read(model, FORMS[form] | {"lora": "pirate"}).lora == "pirate"
    refused(model, FORMS[form] | {"lora": 5}, "'/lora', 'number' not in 'string'")
    refused(model, FORMS[form] | {"lora": None}, "'/lora', 'string' not in 'null'")


@both_forms
def test_images_are_refused(form):
    for image in ("bytes", [1, 2]):
        refused(GEMMA_2B, FORMS[form] | {"image": image}, "reads text only")


def test_functions_are_validated_and_not_run():
    request = read(GEMMA_2B, FORMS["messages"] | {"functions": [{"name": "f", "code": "throw 1"}]})
    assert request == read(GEMMA_2B, FORMS["messages"])


def test_tools_come_in_both_forms():
    nested = {"type": "function", "function": TOOL}
    flat, wrapped = (read(GEMMA_2B, FORMS["messages"] | {"tools": [tool]}) for tool in (TOOL, nested))
    assert flat.tools == wrapped.tools == (TOOL,)
    refused(GEMMA_2B, FORMS["messages"] | {"tools": [TOOL, TOOL]}, "declared twice")
    refused(GEMMA_2B, FORMS["messages"] | {"tools": [TOOL | {"name": "get-weather"}]}, "letters, digits")


def test_tools_have_a_limit():
    many = [TOOL | {"name": f"f{i}"} for i in range(129)]
    assert len(read(GEMMA_2B, FORMS["messages"] | {"tools": many[1:]}).tools) == 128
    refused(GEMMA_2B, FORMS["messages"] | {"tools": many}, "Length of '/tools' must be <= 128")
    read(GEMMA_7B, FORMS["messages"] | {"tools": many})


@both_models
def test_there_must_be_messages(model):
    refused(model, {"messages": []}, "'/messages' is empty")


@pytest.mark.parametrize("model", ["", "gemma-2b-it-lora", "@cf/google/gemma-2b-it", "@cf/google/gemma-2b-it-lora/"])
def test_other_models_are_unknown(model):
    refused(model, TEXT, "No such model .* or task", code=5007)


def test_nesting_has_an_end():
    def nested(depth):
        value = "x"
        for _ in range(depth):
            value = [value]
        return TEXT | {"metadata": value}

    read(GEMMA_7B, nested(DEEPEST - 1))
    refused(GEMMA_7B, nested(DEEPEST + 1), "nested more than 64 deep")
    refused(GEMMA_7B, nested(100_000), "nested more than 64 deep")


@pytest.mark.parametrize("inputs", [None, True, 5, "prompt", [], [TEXT]])
def test_a_request_is_an_object(inputs):
    refused(GEMMA_2B, inputs, "Type mismatch of '/'")
