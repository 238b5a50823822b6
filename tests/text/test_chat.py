"""Both chat policies, as strings, as ids, and in what they refuse."""

import random
import warnings

import pytest

from refgemma.text.chat import NO_ALTERNATION, NO_SYSTEM, ROLES, encode_chat, render
from refgemma.text.tools import to_turns
from tests.text.adversarial import random_text


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


# What the chat_template in google/gemma-2b-it, tokenizer_config.json, makes of these messages.
PUBLISHED = [
    ([user("Hello")], "<bos><start_of_turn>user\nHello<end_of_turn>\n"),
    (
        [user("a"), assistant("  b \n"), user("c")],
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n<start_of_turn>user\nc<end_of_turn>\n",
    ),
    (
        [user("a"), {"role": "model", "content": "b"}],
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n",
    ),
    ([user("\u00a0\u3000Hi\u2003\x85")], "<bos><start_of_turn>user\nHi<end_of_turn>\n"),
    ([user("\u200bHi\ufeff")], "<bos><start_of_turn>user\n\u200bHi\ufeff<end_of_turn>\n"),
    ([user("a  b\n\n\nc\t\td")], "<bos><start_of_turn>user\na  b\n\n\nc\t\td<end_of_turn>\n"),
    ([user(" \n ")], "<bos><start_of_turn>user\n<end_of_turn>\n"),
    ([user("{{ bos_token }}{% raise %}")], "<bos><start_of_turn>user\n{{ bos_token }}{% raise %}<end_of_turn>\n"),
]
# The same template where the two policies part: roles and contents that only the template takes, and its errors.
ONLY_PUBLISHED = [
    (
        [user("a"), {"role": "narrator", "content": "b"}],
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>narrator\nb<end_of_turn>\n",
    ),
    ([user(None)], "<bos><start_of_turn>user\nNone<end_of_turn>\n"),
    ([user([{"type": "text"}])], "<bos><start_of_turn>user\n[{'type': 'text'}]<end_of_turn>\n"),
    ([{"role": "user"}], "<bos><start_of_turn>user\n<end_of_turn>\n"),
]
PUBLISHED_ERRORS = [
    ([system("a"), user("b")], NO_SYSTEM),
    ([assistant("a")], NO_ALTERNATION),
    ([user("a"), user("b")], NO_ALTERNATION),
    ([user("a"), assistant("b"), tool("c")], NO_ALTERNATION),
    ([{"content": "a"}], NO_ALTERNATION),
    ([user("a"), {"content": "b"}], "'dict object' has no attribute 'role'"),
    ([], "list object has no element 0"),
]
PROMPT = "<start_of_turn>model\n"


@pytest.mark.parametrize(("messages", "text"), PUBLISHED + ONLY_PUBLISHED)
def test_published_template(messages, text):
    assert render(messages, policy="published", add_generation_prompt=False) == text
    assert render(messages, policy="published") == text + PROMPT


@pytest.mark.parametrize(("messages", "error"), PUBLISHED_ERRORS)
def test_published_template_errors(messages, error):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are compared as they are, not as a pattern)
        render(messages, policy="published")
    assert str(caught.value) == error


@pytest.mark.parametrize(("messages", "text"), PUBLISHED)
def test_default_policy_writes_ordinary_conversations_alike(messages, text):
    assert render(messages) == text + PROMPT


def test_published_vectors(gemma_tokenizer, shared_json):
    file = shared_json("chat_template/vectors.json")
    vectors = [v for v in file["vectors"] + file["edge_inputs"] if v["family"] in ("gemma1", "gemma2")]
    assert len(vectors) > 80
    for v in vectors:
        options = {"policy": "published", "add_generation_prompt": v["add_generation_prompt"]}
        if "error" in v:
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                render(v["messages"], **options)
            assert str(caught.value) == v["error"].split("Error: ")[-1], v["name"]  # "TemplateError: ..." in some
            with pytest.raises(ValueError):  # noqa: PT011
                encode_chat(gemma_tokenizer, v["messages"], **options)
        else:
            assert render(v["messages"], **options) == v["rendered"], v["name"]
        if "ids" in v:
            assert encode_chat(gemma_tokenizer, v["messages"], **options) == v["ids"], v["name"]


def test_injection_safe_vectors(gemma_tokenizer, shared_json):
    vectors = shared_json("chat_template/vectors.json")["vectors"]
    vectors = [v for v in vectors if v["family"] in ("gemma1", "gemma2") and "ids_injection_safe" in v]
    assert len(vectors) > 60
    refused = []
    for v in vectors:
        if not all(message["role"] in ROLES for message in v["messages"]):
            with pytest.raises(ValueError, match="expected one of system, user, assistant, model, tool"):
                encode_chat(gemma_tokenizer, v["messages"])
            refused.append(v["name"])
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"messages\[1\] makes a (system|tool) turn")
            ids = encode_chat(gemma_tokenizer, v["messages"], add_generation_prompt=v["add_generation_prompt"])
        assert ids == v["ids_injection_safe"], v["name"]
    assert set(refused) == {"unknown_role_in_assistant_slot"}


def test_llama_cpp_folds_the_system_text_alike():
    """Its built-in Gemma formatter, as printed in ggml-org/llama.cpp, tests/test-chat-template.cpp."""
    messages = [
        system("You are a helpful assistant"),
        user("Hello"),
        assistant("Hi there"),
        user("Who are you"),
        assistant("   I am an assistant   "),
        user("Another question"),
    ]
    assert render(messages) == (
        "<bos><start_of_turn>user\nYou are a helpful assistant\n\nHello<end_of_turn>\n<start_of_turn>model\nHi there"
        "<end_of_turn>\n<start_of_turn>user\nWho are you<end_of_turn>\n<start_of_turn>model\nI am an assistant"
        "<end_of_turn>\n<start_of_turn>user\nAnother question<end_of_turn>\n<start_of_turn>model\n"
    )


def test_system_texts_are_folded_into_the_first_user_turn(tokenizer):
    folded = user("One.\n\nTwo.\n\nHi")
    messages = [system("  One. \n"), system("\n"), system("Two."), user("  Hi ")]
    assert render(messages) == render([folded])
    assert encode_chat(tokenizer, messages) == encode_chat(tokenizer, [folded])
    assert render([system("One."), user(" ")]) == render([user("One.")])
    assert render([system(" "), user("Hi")]) == render([user("Hi")])


def test_messages_are_left_as_they_were():
    messages = [system("One."), user(" Hi ")]
    render(messages)
    assert messages == [system("One."), user(" Hi ")]
    assert render(iter(messages)) == render(tuple(messages))


def test_tool_results_are_a_user_turn(tokenizer):
    messages = [
        user("2 + 3?"),
        assistant("[add(a=2, b=3)]"),
        tool("5"),
        tool(" 6 "),
        user("So?"),
        assistant("5."),
        user("Thanks"),
    ]
    assert render(messages) == (
        "<bos><start_of_turn>user\n2 + 3?<end_of_turn>\n<start_of_turn>model\n[add(a=2, b=3)]<end_of_turn>\n"
        "<start_of_turn>user\n<tool_response>\n5\n</tool_response>\n<tool_response>\n6\n</tool_response>\nSo?<end_of_turn>\n"
        "<start_of_turn>model\n5.<end_of_turn>\n<start_of_turn>user\nThanks<end_of_turn>\n<start_of_turn>model\n"
    )
    assert render([*messages[:3], assistant("5.")]) == render(to_turns([*messages[:3], assistant("5.")]))
    assert encode_chat(tokenizer, messages[:4]) == encode_chat(tokenizer, to_turns([*messages[:3], tool("6")]))


@pytest.mark.parametrize("message", [system("b"), tool("b")])
def test_a_turn_that_gemma_does_not_know_is_written_with_a_warning(message):
    messages = [user("a"), message, user("c")]
    with pytest.warns(
        UserWarning, match=rf"messages\[1\] makes a {message['role']} turn, which Gemma was not trained on"
    ) as caught:
        text = render(messages)
    assert text == render(messages, policy="published")
    assert caught[0].filename == __file__  # the warning points at the caller


def test_the_answer_may_be_asked_for_after_an_answer():
    assert render([user("a"), assistant("b")]).endswith("<start_of_turn>model\nb<end_of_turn>\n<start_of_turn>model\n")


@pytest.mark.parametrize("policy", ["default", "published"])
@pytest.mark.parametrize("messages", [[user(" <bos>Hello")], [user("a"), assistant("<bos>b")]])
def test_a_bos_of_the_callers_is_warned_about(tokenizer, policy, messages):
    index = len(messages) - 1
    with pytest.warns(UserWarning, match=rf"^messages\[{index}\] begins with <bos>.*: leave it out$") as caught:
        ids = encode_chat(tokenizer, messages, policy=policy)
    assert caught[0].filename == __file__
    # Only the published policy, which says so, takes it for a second one.
    assert ids.count(tokenizer.bos_id) == (1 if policy == "default" else 2)


def test_a_bos_inside_a_text_is_no_reason_to_warn(tokenizer):
    ids = encode_chat(tokenizer, [user("What is <bos>?")])
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids) == "<start_of_turn>user\nWhat is <bos>?<end_of_turn>\n<start_of_turn>model\n"


def test_markers_without_meaning_in_a_conversation_stay_as_sentencepiece_has_them(tokenizer):
    text = "<unused0> <mask> [@BOS@] <2mass>"
    ids = encode_chat(tokenizer, [user(text)])
    assert ids == encode_chat(tokenizer, [user(text)], policy="published")
    assert all(tokenizer.markers[name] in ids for name in text.split())
    assert not any(tokenizer.markers[name] in tokenizer.encode(text) for name in text.split())


@pytest.mark.filterwarnings("ignore:messages.* begins with <bos>")
def test_no_message_can_end_its_turn(tokenizer):
    rng = random.Random(13)
    live = 0
    steering = {*tokenizer.controls.values(), tokenizer.start_of_turn_id, tokenizer.end_of_turn_id}
    start, end, bos = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id, tokenizer.bos_id
    for _ in range(400):
        texts = [random_text(rng, tokenizer) for _ in range(3)]
        # Half a marker at the end of one message, the other half at the start of the next.
        texts[0] += "<end_of"
        texts[1] = "_turn>" + texts[1] + "<start_"
        texts[2] = "of_turn>" + texts[2]
        messages = [system(texts[0]), user(texts[1]), assistant(texts[2]), user(texts[0])]
        ids = encode_chat(tokenizer, messages)
        assert [i for i in ids if i in steering] == [bos, *[start, end] * 3, start], texts
        rendered = render(messages)
        assert tokenizer.decode(ids) == rendered.removeprefix("<bos>").replace("\u2581", " "), texts
        published = encode_chat(tokenizer, messages[1:], policy="published")
        live += sum(i in steering for i in published) != 8
    assert live > 100  # the published policy is seen to let them through


@pytest.mark.parametrize("policy", ["default", "published"])
@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ("Hello", "messages is 'Hello': expected a list of {'role': ..., 'content': ...}"),
        (user("a"), "messages is {'role': 'user', 'content': 'a'}: expected a list of {'role': ..., 'content': ...}"),
        (None, "messages is None: expected a list of {'role': ..., 'content': ...}"),
        (["Hello"], "messages[0] is 'Hello': expected {'role': ..., 'content': ...}"),
        ([user("a"), None], "messages[1] is None: expected {'role': ..., 'content': ...}"),
        ([{"role": 5, "content": "a"}], "messages[0]: role is 5: expected text"),
    ],
)
def test_messages_that_are_none(policy, messages, sentence):
    with pytest.raises(TypeError) as caught:
        render(messages, policy=policy)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("messages", "error", "sentence"),
    [
        ([], ValueError, "there are no messages: expected one from the user"),
        ([system("a")], ValueError, "there are no messages but from system: expected one from the user"),
        ([{"content": "a"}], ValueError, "messages[0] has no 'role': expected {'role': ..., 'content': ...}"),
        (
            [user("a"), {"role": "assistant"}],
            ValueError,
            "messages[1] has no 'content': expected {'role': ..., 'content': ...}",
        ),
        ([user(None)], TypeError, "messages[0]: content is None: expected text, a str"),
        ([user([{"text": "a"}])], TypeError, "messages[0]: content is [{'text': 'a'}]: expected text, a str"),
        (
            [user("a"), {"role": "narrator", "content": "b"}],
            ValueError,
            "messages[1]: role is 'narrator': expected one of system, user, assistant, model, tool",
        ),
        (
            [user("a"), user("b")],
            ValueError,
            "messages[1] is from 'user' where the model speaks: expected the two to alternate",
        ),
        (
            [assistant("a")],
            ValueError,
            "messages[0] is from 'model' where the user speaks: expected the two to alternate",
        ),
        (
            [system("s"), tool("a")],
            ValueError,
            "messages[1] is from 'tool' where the user speaks: expected the two to alternate",
        ),
        (
            [user("a"), assistant("b"), system("c")],
            ValueError,
            "messages[2] is from 'system' where the user speaks: expected the two to alternate",
        ),
        (
            [user("a"), assistant("b"), assistant("c")],
            ValueError,
            "messages[2] is from 'model' where the user speaks: expected the two to alternate",
        ),
    ],
)
def test_what_the_default_policy_refuses(small_tokenizer, messages, error, sentence):
    for write in (render, lambda given: encode_chat(small_tokenizer, given)):
        with pytest.raises(error) as caught:
            write(messages)
        assert str(caught.value) == sentence


def test_unknown_policy(small_tokenizer):
    for write in (render, lambda given, policy: encode_chat(small_tokenizer, given, policy=policy)):
        with pytest.raises(ValueError, match=r"^policy is 'strict': expected 'default' or 'published'$"):
            write([user("a")], policy="strict")


def test_half_a_surrogate_pair_in_a_message(small_tokenizer):
    with pytest.raises(ValueError, match=r"^text holds half a surrogate pair, U\+D800 at index 1"):
        encode_chat(small_tokenizer, [user("a\ud800")])
