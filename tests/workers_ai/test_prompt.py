"""The prompt: turns made of system texts, tools, tool results and JSON mode; and the limit of the context."""

import json
from dataclasses import replace

import pytest

from refgemma.text import render
from refgemma.text.tools import render_preamble, render_results
from refgemma.workers_ai import AiError, read
from refgemma.workers_ai.pages import GEMMA_2B, GEMMA_7B
from refgemma.workers_ai.prompt import turns
from tests.tiny_it import tiny_it
from tests.workers_ai.keyword_cases import TOOL, USER

CALL = {"name": "get_weather", "arguments": {"city": "Paris"}}
RESULT = {"role": "tool", "content": '{"weather": "rainy"}', "name": "get_weather"}


def tokens(inputs, model=GEMMA_2B):
    return read(model, inputs).tokens(tiny_it())


def encoded(text, control="all"):
    return tiny_it().tokenizer.encode(text, bos=True, control=control)


def test_a_prompt_is_written_as_one_user_turn():
    assert tokens({"prompt": " Hello "}) == encoded("<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n")
    assert tokens({"prompt": "Hello"}) == tokens({"messages": [{"role": "user", "content": "Hello"}]})


def test_a_system_message_goes_into_the_first_user_turn():
    messages = [{"role": "system", "content": "You are a friendly assistant"}, {"role": "user", "content": "Hello"}]
    text = "<start_of_turn>user\nYou are a friendly assistant\n\nHello<end_of_turn>\n<start_of_turn>model\n"
    assert tokens({"messages": messages}) == encoded(text)


def test_raw_text_is_live_and_gets_one_bos():
    text = "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    ids = tokens({"prompt": text, "raw": True})
    assert ids == encoded(text) == tokens({"prompt": f"<bos>{text}", "raw": "true"})
    assert ids.count(tiny_it().tokenizer.bos_id) == 1
    # The same text as a prompt is quoted, not obeyed.
    assert tokens({"prompt": text}).count(tiny_it().tokenizer.end_of_turn_id) == 1
    # The pages' own example is for another model, and plain text for this one.
    mistral = "<s>[INST]comedian[/INST]</s>\n[INST]tell me a joke about cloudflare[/INST]"
    assert tokens({"prompt": mistral, "raw": True}) == encoded(mistral)


def test_raw_messages_are_joined_by_nothing():
    messages = [{"role": "system", "content": "Once "}, {"role": "user", "content": "upon a time"}]
    assert tokens({"messages": messages, "raw": True}) == encoded("Once upon a time")


def test_tools_stand_before_the_first_question():
    request = read(GEMMA_2B, {"messages": [{"role": "system", "content": "Be kind."}, USER], "tools": [TOOL]})
    (system, user) = turns(request.messages, tools=request.tools)
    assert system == {"role": "system", "content": "Be kind."}
    assert user["content"] == render_preamble([TOOL]) + USER["content"]


@pytest.mark.parametrize(
    "assistant",
    [
        {"content": "", "tool_calls": [CALL]},
        {"content": "", "tool_calls": [{"id": "x", "type": "function", "function": CALL}]},
        {"content": "", "tool_calls": [{"function": CALL | {"arguments": '{"city": "Paris"}'}}]},
        {"content": "", "tool_calls": [CALL | {"function": 5}]},
        {"content": json.dumps(CALL)},  # as Cloudflare's ai-utils reports it
        {"content": json.dumps([CALL])},
        {"content": '[get_weather(city="Paris")]'},  # as the model wrote it
    ],
)
def test_a_call_and_its_result_become_turns(assistant):
    messages = [USER, {"role": "assistant"} | assistant, RESULT]
    assert turns(messages) == [
        USER,
        {"role": "assistant", "content": '[get_weather(city="Paris")]'},
        {"role": "user", "content": render_results([RESULT["content"]])},
    ]
    render(turns(messages))


@pytest.mark.parametrize(
    ("given", "read_as"),
    [
        ('{"weather":"rainy","degrees":17}', '{"weather": "rainy", "degrees": 17}'),
        ('{\n  "a": [\n    1,\n    2\n  ]\n}', '{"a": [1, 2]}'),
        ('{"a , b:c":"x,y: \\"z\\",  \\\\","d":[]}', '{"a , b:c": "x,y: \\"z\\",  \\\\", "d": []}'),
        # Nothing is read as a number and written again, and nothing is lost.
        ('{"a":1.10,"a":1e400,"b":-0,"c":"\\u00e9"}', '{"a": 1.10, "a": 1e400, "b": -0, "c": "\\u00e9"}'),
        ("{a:1,b:2}", "{a:1,b:2}"),  # no JSON
        ("12,5", "12,5"),
        ("[" * 100_000, "[" * 100_000),
        ('"a:b,c"', '"a:b,c"'),
    ],
)
def test_results_are_spaced_as_the_model_has_seen_them(given, read_as):
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    *_, result = turns([USER, called, RESULT | {"content": given}])
    assert result["content"] == render_results([read_as])
    assert turns([{"role": "user", "content": given}])[0]["content"] == given  # texts of people stay


def test_json_that_no_result_follows_is_text():
    messages = [USER, {"role": "assistant", "content": json.dumps(CALL)}, {"role": "user", "content": "Go on."}]
    assert turns(messages) == messages
    assert turns(messages[:2]) == messages[:2]


@pytest.mark.parametrize("calls", ["abc", [5], [{}], [{"name": "f"}], [{"function": 5}], {"name": "f"}])
def test_malformed_calls_are_refused(calls):
    with pytest.raises(AiError, match=r"5006: .*'/messages/1/tool_calls"):
        tokens({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": calls}, RESULT]})


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"role": "bob", "content": "Hello"}], "role is 'bob'"),
        ([USER, USER], "alternate"),
        ([{"role": "assistant", "content": "Hello"}, USER], "alternate"),
        ([{"role": "system", "content": "Be kind."}], "expected one from the user"),
        ([{"role": "user", "content": "half a pair: \ud83c"}], "half a surrogate pair"),
        ([USER, {"role": "assistant", "tool_calls": [CALL | {"arguments": "{"}], "content": ""}, RESULT], "arguments"),
    ],
)
def test_what_makes_no_conversation_is_refused(messages, match):
    with pytest.raises(AiError, match=match) as caught:
        tokens({"messages": messages})
    assert caught.value.code == 5006


def test_the_wish_for_json_follows_the_system_texts():
    schema = {"type": "object", "required": ["answer"]}
    system = {"role": "system", "content": "Be kind."}
    for form, wanted in (
        ({"type": "json_object"}, "JSON object"),
        ({"type": "json_schema", "json_schema": schema}, json.dumps(schema)),
    ):
        request = read(GEMMA_2B, {"messages": [system, USER], "response_format": form})
        first, wish, user = turns(request.messages, answer_schema=request.answer_schema)
        assert (first, user, wish["role"]) == (system, USER, "system")
        assert wanted in wish["content"]
    raw = {"prompt": "Hello", "raw": True}
    assert tokens(raw | {"response_format": {"type": "json_object"}}) == tokens(raw)  # no place for one


@pytest.mark.parametrize(("model", "context"), [(GEMMA_2B, 8192), (GEMMA_7B, 3500)])
def test_prompt_and_answer_share_the_context(model, context):
    gemma = tiny_it()

    def request(length):
        # A literal <unk> is one token of raw text; <bos> makes one more. All in one message would be too long for 7B.
        counts = [min(1000, length - 1 - start) for start in range(0, length - 1, 1000)]
        parts = [{"role": "user", "content": "<unk>" * count} for count in counts]
        return read(model, {"messages": parts, "raw": True, "max_tokens": 9})

    one = request(context - 1)
    ids = one.tokens(gemma)
    assert len(ids) == context - 1
    assert one.settings(gemma, ids).max_tokens == 1
    ten = request(context - 10)
    assert ten.settings(gemma, ten.tokens(gemma)).max_tokens == 9
    with pytest.raises(AiError, match=f"5006: .*{context} messages, too many for the context of {context} tokens"):
        read(model, {"messages": [RESULT] * context})  # refused without being looked at one by one
    # A local model's own context may be smaller than the page's.
    small = replace(gemma, config=replace(gemma.config, max_positions=50))
    with pytest.raises(AiError, match=r"5006: .*50 messages, too many for the context of 50 tokens"):
        read(model, {"messages": [RESULT] * 50}).tokens(small)
    with pytest.raises(AiError, match=f"5006: .*{context} tokens, too many for the context of {context} tokens"):
        request(context).tokens(gemma)
