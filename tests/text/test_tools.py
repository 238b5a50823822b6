"""Tool calls: what enters the prompt, and that only a clean call of a declared tool comes out of an answer."""

import json

import pytest

from refgemma.text.tools import (
    LONGEST_CALL,
    ToolCallError,
    normalize_tools,
    parse_calls,
    render_calls,
    render_preamble,
    render_results,
    to_turns,
)

WEATHER = {
    "name": "get_weather",
    "description": "Weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
PING = {"name": "ping", "description": "Say that you live"}
TOOLS = [WEATHER, PING]


def test_both_forms_of_a_declaration_mean_the_same():
    nested = {"type": "function", "function": WEATHER}
    assert normalize_tools([nested]) == normalize_tools([WEATHER]) == [WEATHER]


def test_preamble_holds_one_declaration_a_line_and_ends_in_an_empty_line():
    text = render_preamble(TOOLS)
    head, *declarations = text.removesuffix("\n\n").split("\n")[1:]
    assert text.endswith("\n\n")
    assert head == "Functions:"
    assert [json.loads(line) for line in declarations] == TOOLS
    assert "[name(key=value)]" in text
    assert '"parameters": {...}' in render_preamble(TOOLS, style="json")
    assert render_preamble([]) == ""


@pytest.mark.parametrize("style", ["python", "json"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "Zürich 🌧", "days": -3},
        {"city": 'a "quoted"\n[b(c=1)] \\ line', "days": 2.5},
        {"city": ["x", {"y": [True, False, None]}], "days": {}},
    ],
)
def test_what_is_rendered_is_read_back(style, arguments):
    calls = [{"name": "get_weather", "arguments": arguments}]
    assert parse_calls(render_calls(calls, style=style), TOOLS) == calls
    calls.append({"name": "ping", "arguments": {}})
    assert parse_calls(render_calls(calls, style=style), TOOLS) == calls


def test_python_style_is_spelled_as_documented():
    call = {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}
    assert render_calls([call]) == '[get_weather(city="Paris", days=2)]'


@pytest.mark.parametrize(
    "text",
    [
        "It is sunny in Paris.",
        "",
        "[1, 2, 3]",
        "[see the list]",
        'I call [get_weather(city="Paris")]',
        'get_weather(city="Paris")',
        '```tool_code\n[get_weather(city="Paris")]\n```',
        '[get_weather(city="' + "x" * LONGEST_CALL + '")]',
    ],
)
def test_plain_text_is_no_call(text):
    assert parse_calls(text, TOOLS) == []


def test_without_tools_nothing_is_a_call():
    assert parse_calls('[get_weather(city="Paris")]', []) == []


@pytest.mark.parametrize("text", ['[ get_weather ( city = "Paris", )\n]', "[get_weather(city='Paris')]"])
def test_python_style_allows_python_spacing_and_quotes(text):
    assert parse_calls(text, TOOLS) == [{"name": "get_weather", "arguments": {"city": "Paris"}}]


def test_arguments_may_be_called_arguments_in_json():
    text = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    assert parse_calls(text, TOOLS) == [{"name": "get_weather", "arguments": {"city": "Paris"}}]


def test_a_fenced_block_counts_only_if_asked_for():
    text = '```tool_code\n[get_weather(city="Paris")]\n```'
    assert parse_calls(text, TOOLS, fenced=True) == [{"name": "get_weather", "arguments": {"city": "Paris"}}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[get_weather(city="Paris"', "not a valid list of calls"),
        ('[get_weather(city="Paris")] Done.', "not a valid list of calls"),
        ('[get_weather(city="Paris")][0]', "something after the list"),
        ('[get_weather(city="Paris"), 3]', "not a call"),
        ("[get_weather.now(city=1)]", "not a call"),
        ('[get_weather("Paris")]', "argument without a name"),
        ('[get_weather(**{"city": "Paris"})]', "argument without a name"),
        ('[get_weather(city="Paris", city="Rome")]', "given twice"),
        ("[get_weather(city=Paris)]", "not a literal"),
        ("[get_weather(city=open('x').read())]", "not a literal"),
        ("[get_weather(city='a' + 'b')]", "not a literal"),
        ("[get_weather(city=f'{1}')]", "not a literal"),
        ("[get_weather(city=b'bytes')]", "not a literal"),
        ("[get_weather(city=1j)]", "not a literal"),
        ("[get_weather(city=...)]", "not a literal"),
        ("[get_weather(city={1: 2})]", "not a literal"),
        ("[get_weather(city={**{}})]", "not a literal"),
        ("[get_weather(city=--1)]", "not a literal"),
        ("[get_weather(city=-True)]", "not a literal"),
        ("[get_weather(city=" + "-" * 9000 + "1)]", "not a"),
        ("[get_weather(city=" + "[" * 5000 + "]" * 5000 + ")]", "not a"),
        ("[get_weather(city=" + "9" * 5000 + ")]", "not a valid list of calls"),
        ('[get_time(city="Paris")]', "does not declare: it declares get_weather, ping"),
        ("[get_weather(days=2)]", "lacks city: its parameters are city, days"),
        ('[get_weather(city="Paris", when="now")]', "has unknown when"),
        ('{"name": "get_weather"}', "not a call"),
        ('{"name": "get_weather", "parameters": {}, "arguments": {}}', "not a call"),
        ('{"name": "get_weather", "parameters": {"city": NaN}}', "not valid JSON"),
        ('{"name": "get_weather", "parameters": {"city": "Paris"}', "not valid JSON"),
        ('{"name": "get_weather", "parameters": {"city": "a", "city": "b"}}', "given twice"),
        ('[get_weather(city={"a": 1, "a": 2})]', "given twice"),
        ('{"name": "rm", "parameters": {}}', "does not declare"),
        ("[{" + '"a":[' * 2500 + "]" * 2500 + "}]", "not"),
    ],
)
def test_a_malformed_call_is_one_clear_sentence(text, reason):
    with pytest.raises(ToolCallError, match=reason) as caught:
        parse_calls(text, TOOLS)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_nothing_is_evaluated(tmp_path):
    victim = tmp_path / "victim"
    with pytest.raises(ToolCallError):
        parse_calls(f"[ping(x=__import__('pathlib').Path({str(victim)!r}).touch())]", TOOLS)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        (["get_weather"], "expected an object"),
        ([{"name": "get weather"}], "letters, digits and underscores"),
        ([{"description": "no name"}], "tool name is None"),
        ([PING, PING], "declared twice"),
        ([{"name": "x", "parameters": []}, {"name": "y", "parameters": [1]}], "JSON Schema object"),
    ],
)
def test_a_malformed_declaration_is_one_clear_sentence(tools, reason):
    with pytest.raises(ValueError, match=reason):
        render_preamble(tools)


def test_unknown_styles_are_refused():
    for use in (lambda: render_preamble(TOOLS, style="xml"), lambda: render_calls([], style="xml")):
        with pytest.raises(ValueError, match="expected 'python' or 'json'"):
            use()


def test_a_conversation_with_tools_becomes_alternating_turns():
    messages = [
        {"role": "user", "content": "Weather in Paris and Rome?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"name": "get_weather", "arguments": {"city": "Paris"}},
                {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}},
            ],
        },
        {"role": "tool", "content": '{"degrees": 17}'},
        {"role": "tool", "content": {"degrees": 21}},
        {"role": "user", "content": "And now in words."},
    ]
    turns = to_turns(messages, TOOLS)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[0]["content"] == render_preamble(TOOLS) + "Weather in Paris and Rome?"
    assert turns[1]["content"] == '[get_weather(city="Paris"), get_weather(city="Rome")]'
    assert turns[2]["content"] == render_results(['{"degrees": 17}', '{"degrees": 21}']) + "\nAnd now in words."


def test_the_preamble_goes_before_the_first_user_turn_only():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert to_turns(messages) == messages
    assert [turn["content"] for turn in to_turns(messages, [PING])] == [
        "Be brief.",
        render_preamble([PING]) + "a",
        "b",
        "c",
    ]
    with pytest.raises(ValueError, match="no user message"):
        to_turns(messages[:1], [PING])


@pytest.mark.parametrize(
    "call", [{"name": "ping", "arguments": "{"}, {"name": "ping", "arguments": "[]"}, {"arguments": {}}]
)
def test_a_malformed_call_in_the_history_is_one_clear_sentence(call):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(ValueError, match="expected a name and an arguments object"):
        to_turns(messages, [PING])
