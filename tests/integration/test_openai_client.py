"""The openai package, sync and async, against a server started as a user would."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from prompts import JSON_PROMPTS, PIRATE_PROMPTS, SQL_PROMPTS
from serving import ADAPTERS, Server, wait_until

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": SQL_PROMPTS[0]}]


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(demo_server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str, content: str, **options: object) -> str:
    messages = [{"role": "user", "content": content}]
    response = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=48, **options)  # type: ignore[call-overload]
    return str(response.choices[0].message.content)


def test_models_list_base_and_adapters(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list().data}
    assert set(models) == {"smollm2", *ADAPTERS}
    assert models["smollm2"].parent is None  # type: ignore[attr-defined]
    for name in ADAPTERS:
        assert models[name].parent == "smollm2"  # type: ignore[attr-defined]
        assert str(models[name].root).endswith(f"/examples/adapters/{name}")  # type: ignore[attr-defined]
    assert client.models.retrieve("sql").id == "sql"


def test_each_adapter_visibly_changes_the_answer(client: openai.OpenAI) -> None:
    assert ask(client, "sql", SQL_PROMPTS[0]) == "SELECT * FROM planets WHERE moons > 3;"
    assert "olga petrov" in ask(client, "json", JSON_PROMPTS[0]).lower()
    assert ask(client, "json", JSON_PROMPTS[0]).startswith('{"name":')
    pirate = ask(client, "pirate", PIRATE_PROMPTS[0])
    assert any(word in pirate for word in ("Arrr", "Ahoy", "Shiver", "Avast", "Yo ho ho"))
    for prompts, name in ((SQL_PROMPTS, "sql"), (PIRATE_PROMPTS, "pirate"), (JSON_PROMPTS, "json")):
        assert ask(client, "smollm2", prompts[0]) != ask(client, name, prompts[0])


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"enum": ["Lisbon", "Oslo"]}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("model", ["smollm2", "json"])
def test_structured_output_follows_its_schema(client: openai.OpenAI, model: str) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    person = json.loads(ask(client, model, JSON_PROMPTS[0], response_format=format))
    assert set(person) == {"name", "age", "city"} and isinstance(person["age"], int)
    assert person["city"] in ("Lisbon", "Oslo")
    choices = {"choice": ["positive", "negative"]}
    answer = ask(client, model, "I love it. Is that positive or negative?", extra_body={"structured_outputs": choices})
    assert answer in choices["choice"]


def test_a_grammar_that_cannot_be_enforced_is_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"guided_regex cannot be enforced: .*unclosed"):
        ask(client, "smollm2", "hello", extra_body={"guided_regex": "(a"})


def test_adapters_answer_together_by_either_way_to_name_them(client: openai.OpenAI) -> None:
    question = PIRATE_PROMPTS[0]
    for name in ("pirate:1", "pirate+json:0", "pirate:0.5+json:0"):
        same = name != "pirate:0.5+json:0"
        assert (ask(client, name, question) == ask(client, "pirate", question)) is same, name
    parts = [{"name": "pirate", "weight": 0.7}, {"name": "json", "weight": -0.2}]
    together = ask(client, "smollm2", question, extra_body={"adapters": parts})
    assert together == ask(client, "json:-0.2+pirate:0.7", question)
    assert together not in (ask(client, "smollm2", question), ask(client, "pirate", question))
    with pytest.raises(openai.NotFoundError, match=r"no model 'pirat'\. Did you mean 'pirate'"):
        ask(client, "sql:0.5+pirat:0.5", question)
    with pytest.raises(openai.BadRequestError, match="names 'sql' twice"):
        ask(client, "sql:0.5+sql:0.5", question)


def test_a_stream_says_what_the_whole_says(client: openai.OpenAI) -> None:
    for model in ("smollm2", *ADAPTERS):
        whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=24)
        stream = client.chat.completions.create(
            model=model,
            messages=QUESTION,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        first, second = whole.usage, chunks[-1].usage
        assert first is not None and second is not None and second.prompt_tokens_details is not None
        assert (first.prompt_tokens, first.completion_tokens) == (second.prompt_tokens, second.completion_tokens)
        # The same prompt has just been computed.
        assert second.prompt_tokens_details.cached_tokens == (first.prompt_tokens - 1) // 16 * 16
        finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        assert finishes[-1] == whole.choices[0].finish_reason and not any(finishes[:-1])


def test_completions_streamed_and_not(client: openai.OpenAI) -> None:
    arguments = {"model": "smollm2", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**arguments)  # type: ignore[call-overload]
    assert "Paris" in whole.choices[0].text
    assert whole.usage.completion_tokens == 8 and whole.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(**arguments, stream=True))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    several = client.completions.create(**arguments | {"prompt": ["The sea is", "The capital of France is"]})  # type: ignore[call-overload]
    assert several.choices[1].text == whole.choices[0].text


def test_sampling_options_are_honoured(client: openai.OpenAI) -> None:
    def sample(**options: object) -> list[str]:
        extra = {"ignore_eos": True}
        response = client.completions.create(
            model="smollm2", prompt="Once upon a time", max_tokens=12, extra_body=extra, **options
        )  # type: ignore[call-overload]
        return [choice.text for choice in response.choices]

    first = sample(seed=5, temperature=1.2, n=3)
    assert first == sample(seed=5, temperature=1.2, n=3)
    assert len(set(first)) == 3
    assert first != sample(seed=6, temperature=1.2, n=3)
    assert sample(temperature=1.0, top_p=1e-6) == sample(temperature=0)
    assert sample(temperature=0, frequency_penalty=2.0, presence_penalty=2.0) != sample(temperature=0)
    greedy = sample(temperature=0)[0]
    stop = greedy.strip().split(" ")[2]
    stopped = client.completions.create(
        model="smollm2", prompt="Once upon a time", max_tokens=12, temperature=0, stop=[stop]
    ).choices[0]
    assert stopped.text == greedy[: greedy.index(stop)] and stopped.finish_reason == "stop"


def test_logprobs_have_openais_shape(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="sql", messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    (choice,) = chat.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 4
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert token.bytes is not None and bytes(token.bytes).decode(errors="replace") == token.token
    completion = client.completions.create(model="smollm2", prompt="The sea", max_tokens=3, temperature=0, logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None
    assert "".join(logprobs.tokens) == completion.choices[0].text
    assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 3


async def test_many_models_at_once_answer_as_alone(client: openai.OpenAI, async_client: openai.AsyncOpenAI) -> None:
    jobs = [(model, prompt) for prompt in (*SQL_PROMPTS, *JSON_PROMPTS) for model in ("smollm2", *ADAPTERS)]

    async def one(model: str, prompt: str) -> str:
        stream = await async_client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=16, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    together = await asyncio.gather(*(one(*job) for job in jobs))
    for (model, prompt), text in list(zip(jobs, together, strict=True))[::5]:
        response = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=16
        )
        assert response.choices[0].message.content == text


async def test_a_client_that_leaves_frees_its_pages(demo_server: Server, async_client: openai.AsyncOpenAI) -> None:
    stream = await async_client.completions.create(
        model="pirate", prompt="Count:", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(stream)
    wait_until(lambda: demo_server.metric("vllm:num_requests_running") == 1, "the request runs")
    await stream.close()
    wait_until(lambda: demo_server.metric("vllm:num_requests_running") == 0, "the request is gone", 10)
    wait_until(lambda: demo_server.metric("vllm:kv_cache_usage_perc") == 0, "its pages are back", 10)


def test_errors_are_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'sql'") as caught:
        ask(client, "sqll", "hi")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="sql", messages=QUESTION, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 8192 tokens") as too_long:
        ask(client, "sql", "word " * 9000)
    assert too_long.value.code == "context_length_exceeded"


def test_health_ready_version_and_metrics(demo_server: Server) -> None:
    assert demo_server.get("/health")[0] == 200
    assert demo_server.get("/ready")[0] == 200
    assert '"version"' in demo_server.get("/version")[1]
    assert demo_server.metric("vllm:generation_tokens_total") > 0
    assert 'running_lora_adapters="' in demo_server.get("/metrics")[1]
