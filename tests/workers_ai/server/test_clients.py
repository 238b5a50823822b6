"""The official clients of OpenAI and Cloudflare, configured with the address only."""

import json
import threading

import pytest

from refgemma.workers_ai.pages import GEMMA_2B, GEMMA_7B
from refgemma.workers_ai.server.app import create_app
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import serving
from tests.workers_ai.server.test_finetunes import CONFIG, WEIGHTS, pirate

pytestmark = pytest.mark.clients
ACCOUNT = "0123456789abcdef"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def own():
    models = {GEMMA_2B: tiny_it(), GEMMA_7B: tiny_it()}
    with serving(create_app(models, {}, token="key", max_rows=1, max_waiting=0)) as address:
        yield address


@pytest.fixture
def openai_client(own):
    openai = pytest.importorskip("openai", reason="needs the openai client (extra clients)")
    with openai.OpenAI(api_key="key", base_url=f"{own}/client/v4/accounts/{ACCOUNT}/ai/v1", max_retries=0) as client:
        yield client


@pytest.fixture
def cloudflare_client(own):
    cloudflare = pytest.importorskip("cloudflare", reason="needs the cloudflare client (extra clients)")
    with cloudflare.Cloudflare(api_token="key", base_url=f"{own}/client/v4", max_retries=0) as client:
        yield client


def ask(client, content="What is 17 + 25?", **options):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(**{"model": GEMMA_2B, "messages": messages, "temperature": 0} | options)


def test_openai_completion(openai_client):
    completion = ask(openai_client)
    assert completion.choices[0].message.content == "17 + 25 = 42."
    assert (completion.choices[0].finish_reason, completion.usage.total_tokens) == ("stop", 34)


def test_openai_stream(openai_client):
    chunks = list(ask(openai_client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "17 + 25 = 42."
    assert chunks[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [True, False])
def test_openai_tools(openai_client, stream):
    question = {"role": "user", "content": "What is the weather in Paris?"}
    if stream:
        with openai_client.chat.completions.stream(
            model=GEMMA_2B, messages=[question], tools=[WEATHER], temperature=0
        ) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = ask(openai_client, question["content"], tools=[WEATHER]).choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "rainy", "degrees": 17}'}
    messages = [question, message.model_dump(exclude_none=True), result]
    answer = ask(openai_client, messages=messages, tools=[WEATHER]).choices[0].message
    assert "17 degrees" in answer.content


def test_openai_errors(openai_client):
    import openai

    with pytest.raises(openai.BadRequestError, match="5006"):
        ask(openai_client, temperature=9)
    with pytest.raises(openai.NotFoundError, match="3037"):
        ask(openai_client, extra_body={"lora": "nothing"})
    with pytest.raises(openai.AuthenticationError):
        ask(openai_client.with_options(api_key="another"))
    with pytest.raises(openai.NotFoundError, match="No route"):
        list(openai_client.models.list())


@pytest.mark.parametrize("how", ["fails", "is stopped"])
def test_openai_hears_of_a_stream_that_is_cut_off(endless, monkeypatch, how):
    openai = pytest.importorskip("openai", reason="needs the openai client (extra clients)")

    def fail(self, scores):
        raise RuntimeError("planted, with a secret in it")

    app = create_app({GEMMA_2B: endless}, {})
    with (
        serving(app) as address,
        openai.OpenAI(api_key="key", base_url=f"{address}/client/v4/accounts/{ACCOUNT}/ai/v1", max_retries=0) as client,
        ask(client, stream=True, max_tokens=8000) as stream,
    ):
        next(stream)
        if how == "fails":
            monkeypatch.setattr("refgemma.generation.Row.next", fail)
        else:
            threading.Thread(target=app.state.service.close, args=(0,)).start()
        with pytest.raises(openai.APIError, match="3043" if how == "fails" else "3008"):
            list(stream)


def test_openai_gets_a_rate_limit_error_when_the_server_is_full(endless):
    openai = pytest.importorskip("openai", reason="needs the openai client (extra clients)")
    with serving(create_app({GEMMA_2B: endless}, {}, max_rows=1, max_waiting=0)) as address:
        base = f"{address}/client/v4/accounts/{ACCOUNT}/ai/v1"
        with (
            openai.OpenAI(api_key="key", base_url=base, max_retries=0) as client,
            ask(client, stream=True, max_tokens=8000),
            pytest.raises(openai.RateLimitError, match="3040"),
        ):
            ask(client)


def test_cloudflare_run(cloudflare_client):
    answer = cloudflare_client.ai.run(
        GEMMA_2B, account_id=ACCOUNT, prompt="What is 17 + 25?", extra_body={"temperature": 0}
    )
    assert as_dict(answer)["response"] == "17 + 25 = 42."


def test_cloudflare_models(cloudflare_client):
    models = list(cloudflare_client.ai.models.list(account_id=ACCOUNT))
    assert [as_dict(model)["name"] for model in models] == [GEMMA_2B, GEMMA_7B]
    schema = cloudflare_client.ai.models.schema.get(account_id=ACCOUNT, model=GEMMA_2B)
    assert "input" in as_dict(schema)


def test_cloudflare_finetunes(cloudflare_client):
    finetunes = cloudflare_client.ai.finetunes
    made = finetunes.create(account_id=ACCOUNT, model=GEMMA_2B, name="sea", description="", public=True)
    for name in (CONFIG, WEIGHTS):
        finetunes.assets.create(made.id, account_id=ACCOUNT, file=(name, pirate(name)), file_name=name)
    assert [finetune.id for finetune in finetunes.public.list(account_id=ACCOUNT)] == [made.id]
    # The client's own type has one object where the service lists several: what it makes of a list is its affair.
    assert made.id in str(finetunes.with_raw_response.list(account_id=ACCOUNT).json())
    body = {"temperature": 0}
    answer = cloudflare_client.ai.run(
        GEMMA_2B, account_id=ACCOUNT, prompt="Who are you?", lora=made.id, extra_body=body
    )
    assert "matey" in as_dict(answer)["response"]


def as_dict(value):
    return value if isinstance(value, dict) else value.model_dump()
