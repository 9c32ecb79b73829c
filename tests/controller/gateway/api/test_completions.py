"""POST /v1/completions against a real gateway, with the openai package and with plain HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

PROMPT = "the quick brown fox"


async def test_a_completion_is_the_workers_tokens_as_text(fleet: Any, tokenizer: Any) -> None:
    num_prompt = len(tokenizer.encode(PROMPT))
    answer = await fleet.openai.completions.create(model="tiny", prompt=PROMPT, max_tokens=num_prompt)
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    assert answer.choices[0].text == PROMPT
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == answer.usage.completion_tokens == num_prompt
    assert answer.usage.total_tokens == 2 * num_prompt


async def test_a_stream_gives_the_same_text_as_no_stream(fleet: Any) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40}
    whole = await fleet.openai.completions.create(**body)
    chunks = [
        chunk
        async for chunk in await fleet.openai.completions.create(
            **body, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_a_stream_ends_with_done_and_is_never_cached(fleet: Any) -> None:
    async with fleet.http.post(
        "/v1/completions", json={"model": "tiny", "prompt": "hello", "stream": True}
    ) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["x-request-id"]
        text = await response.text()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2])


async def test_the_default_is_sixteen_tokens_or_what_a_long_prompt_leaves(fleet: Any) -> None:
    await fleet.openai.completions.create(model="tiny", prompt="hello")
    await fleet.openai.completions.create(model="tiny", prompt=[5] * 60)
    assert [generate.sampling.max_tokens for generate in fleet.worker.generates] == [16, 4]


async def test_prompts_may_be_texts_ids_or_lists_of_ids_and_choices_keep_their_order(
    fleet: Any, tokenizer: Any
) -> None:
    texts = ["hello world", "lazy dog"]
    ids = [tokenizer.encode(text) for text in texts]
    for prompt in (texts, ids):
        answer = await fleet.openai.completions.create(model="tiny", prompt=prompt, n=2, max_tokens=2, stop=["zzz"])
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        wanted = [tokenizer.decode(one[:2]) for one in ids for _ in range(2)]
        assert [choice.text for choice in answer.choices] == wanted
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 8
    answer = await fleet.openai.completions.create(model="tiny", prompt=ids[0], max_tokens=2)
    assert answer.choices[0].text == tokenizer.decode(ids[0][:2])


async def test_choices_differ_by_number_and_prompts_by_seed(fleet: Any) -> None:
    await fleet.openai.completions.create(model="tiny", prompt=["hello", "hello"], n=2, max_tokens=1)
    seen = [(generate.sampling.seed, generate.sampling.choice) for generate in fleet.worker.generates]
    assert [choice for _, choice in seen] == [0, 1, 0, 1]
    assert seen[0][0] == seen[1][0] != seen[2][0] == seen[3][0]
    await fleet.openai.completions.create(model="tiny", prompt=["hello", "hello"], seed=5, max_tokens=1)
    assert {generate.sampling.seed for generate in fleet.worker.generates[4:]} == {5}


async def test_an_adapter_travels_as_its_digest_and_its_name_comes_back(fleet: Any) -> None:
    for model, digest in (("tiny", ""), ("tiny-alias", ""), ("sql-adapter", "d-sql"), ("org/pirate", "d-pirate")):
        answer = await fleet.openai.completions.create(model=model, prompt="hello", max_tokens=1)
        assert answer.model == model
        assert fleet.worker.generates[-1].adapter_digest == digest
        assert fleet.worker.generates[-1].request_id


async def test_the_models_sampling_defaults_hold_until_the_request_says_otherwise(fleet: Any) -> None:
    await fleet.openai.completions.create(model="tiny", prompt="hello")
    await fleet.openai.completions.create(
        model="tiny", prompt="hello", temperature=0, extra_body={"top_k": 3, "min_p": 0.5, "ignore_eos": True}
    )
    first, second = (generate.sampling for generate in fleet.worker.generates)
    assert (first.temperature, first.top_k) == (0.25, 40)
    assert (second.temperature, second.top_k, second.min_p, second.ignore_eos) == (0.0, 3, 0.5, True)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_over_several_tokens_never_leaks(fleet: Any, tokenizer: Any, stream: bool) -> None:
    prompt = "hello world! the lazy dog."
    stop = "ld! t"
    ids = tokenizer.encode(prompt)
    assert not any(stop in tokenizer.decode_token(token_id) for token_id in ids)
    num_used = next(count for count in range(1, len(ids)) if stop in tokenizer.decode(ids[:count]))
    answer = await _complete(fleet, stream, prompt=prompt, stop=["nothing", stop], max_tokens=40)
    assert answer == {"text": "hello wor", "finish_reason": "stop", "stop_reason": stop, "num_tokens": num_used}
    await fleet.until(lambda: fleet.worker.cancels == [1] and not fleet.worker.running)
    answer = await _complete(fleet, stream, prompt=prompt, stop=stop, max_tokens=40, include_stop_str_in_output=True)
    assert answer["text"] == "hello world! t"


@pytest.mark.parametrize("stream", [False, True])
async def test_eos_is_counted_but_is_no_text(fleet: Any, tokenizer: Any, stream: bool) -> None:
    fleet.worker.answer = [*tokenizer.encode("hello"), fleet.worker.eos]
    answer = await _complete(fleet, stream, prompt="x", max_tokens=40)
    num_tokens = len(fleet.worker.answer)
    assert answer == {"text": "hello", "finish_reason": "stop", "stop_reason": None, "num_tokens": num_tokens}
    answer = await _complete(fleet, stream, prompt="x", max_tokens=40, skip_special_tokens=False)
    assert answer["text"] == "hello"


async def test_a_stop_token_is_named_and_hidden(fleet: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("hello world")
    answer = await _complete(fleet, False, prompt="hello world", stop_token_ids=[ids[-1]], max_tokens=40)
    assert answer["text"] == tokenizer.decode(ids[:-1])
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", ids[-1])


@pytest.mark.parametrize("stream", [False, True])
async def test_characters_of_several_tokens_are_never_split(fleet: Any, tokenizer: Any, stream: bool) -> None:
    text = "日本語 😀!"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    answer = await _complete(fleet, stream, prompt=text, max_tokens=len(ids))
    assert answer["text"] == text
    answer = await _complete(fleet, stream, prompt=text, max_tokens=1)
    assert answer["text"] == "\ufffd"


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_in_front(fleet: Any, tokenizer: Any, stream: bool) -> None:
    ids = tokenizer.encode("hello")
    for prompt in ("hello", ids):
        answer = await _complete(fleet, stream, prompt=prompt, echo=True, max_tokens=len(ids))
        assert answer["text"] == "hellohello"


async def test_logprobs_have_the_shape_of_openais(fleet: Any, tokenizer: Any) -> None:
    prompt = "hello 日"
    ids = tokenizer.encode(prompt)
    answer = await fleet.openai.completions.create(model="tiny", prompt=prompt, logprobs=2, max_tokens=len(ids))
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs == [-0.5] * len(ids)
    assert logprobs.tokens[0] == tokenizer.decode_token(ids[0])
    assert logprobs.tokens[-1].startswith("bytes:\\x")
    assert [len(top) for top in logprobs.top_logprobs] == [2] * len(ids)
    assert all(top[token] == -0.5 for top, token in zip(logprobs.top_logprobs, logprobs.tokens, strict=True))
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert token.startswith("bytes:") or prompt[offset:].startswith(token)
    chunks = [
        chunk.choices[0]
        async for chunk in await fleet.openai.completions.create(
            model="tiny", prompt=prompt, logprobs=2, max_tokens=len(ids), stream=True
        )
    ]
    assert [offset for chunk in chunks for offset in chunk.logprobs.text_offset] == logprobs.text_offset
    assert [token for chunk in chunks for token in chunk.logprobs.tokens] == logprobs.tokens


async def test_logprobs_end_with_the_stop_string(fleet: Any) -> None:
    answer = await fleet.openai.completions.create(
        model="tiny", prompt="hello world! hello", logprobs=0, stop="world", max_tokens=40
    )
    choice = answer.choices[0]
    assert choice.text == "hello "
    assert "".join(choice.logprobs.tokens).rstrip("!").endswith("world")
    assert len(choice.logprobs.tokens) == answer.usage.completion_tokens
    assert all(len(top) == 1 for top in choice.logprobs.top_logprobs)


async def _complete(fleet: Any, stream: bool, **body: Any) -> dict[str, Any]:
    """Return one completion's text, reasons and count, streamed or not."""
    body = {"model": "tiny", "stream": stream, **body}
    if not stream:
        status, answer = await fleet.post("/v1/completions", body)
        assert status == 200, answer
        choice = answer["choices"][0]
        return {
            "text": choice["text"],
            "finish_reason": choice["finish_reason"],
            "stop_reason": choice["stop_reason"],
            "num_tokens": answer["usage"]["completion_tokens"],
        }
    async with fleet.http.post("/v1/completions", json=body | {"stream_options": {"include_usage": True}}) as response:
        assert response.status == 200
        events = (await response.text()).split("\n\n")
    assert events[-2] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    return {
        "text": "".join(choice["text"] for choice in choices),
        "finish_reason": choices[-1]["finish_reason"],
        "stop_reason": choices[-1]["stop_reason"],
        "num_tokens": chunks[-1]["usage"]["completion_tokens"],
    }


async def test_usage_tells_how_many_prompt_tokens_were_cached(fleet: Any) -> None:
    body = {"model": "tiny", "prompt": "hello world", "max_tokens": 3, "cache_salt": "abc"}
    _, answer = await fleet.post("/v1/completions", body)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert fleet.worker.generates[0].cache_salt == "abc"
    fleet.worker.num_cached = [1, 2]
    _, answer = await fleet.post("/v1/completions", body | {"prompt": ["hello world", "hello fox"]})
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    fleet.worker.num_cached = [0, 2]
    _, answer = await fleet.post("/v1/completions", body | {"n": 2})
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}, "one choice has computed the prompt"
    fleet.worker.num_cached = [2]
    stream = await fleet.openai.completions.create(
        model="tiny", prompt="hello world", max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 2


async def test_an_empty_or_endless_cache_salt_is_refused(fleet: Any) -> None:
    for salt in ("", "s" * 1025, 7):
        status, answer = await fleet.post("/v1/completions", {"model": "tiny", "prompt": "a", "cache_salt": salt})
        assert (status, answer["error"]["param"]) == (400, "cache_salt")


async def test_rules_about_tokens_reach_the_worker_as_token_ids(fleet: Any, tokenizer: Any) -> None:
    await _complete(
        fleet, False, prompt="hello", logit_bias={"7": -100, "2": 0.5}, allowed_token_ids=[9, 2], bad_words=["the"]
    )
    sampling = fleet.worker.generates[-1].sampling
    assert dict(sampling.logit_bias) == {7: -100.0, 2: 0.5}
    assert list(sampling.allowed_token_ids) == [2, 9]
    forms = [tokenizer.encode(text, add_special_tokens=False) for text in ("the", " the")]
    assert [list(word.token_ids) for word in sampling.bad_words] == forms
