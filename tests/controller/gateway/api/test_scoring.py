"""Log-probabilities of prompts, requests without an answer, the best of several answers, token ids in answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from lorafleet.controller.gateway.api.scoring import best_of
from lorafleet.controller.gateway.streams.generation import ChoiceDelta
from lorafleet.workers.scheduling.logprobs import TokenLogprobs

MESSAGES = [{"role": "user", "content": "hello"}]


async def complete(fleet: Any, **body: Any) -> dict[str, Any]:
    status, answer = await fleet.post("/v1/completions", {"model": "tiny", "max_tokens": 2, **body})
    assert status == 200, answer
    return dict(answer)


async def chunks_of(fleet: Any, path: str, **body: Any) -> list[dict[str, Any]]:
    async with fleet.http.post(path, json={"model": "tiny", "max_tokens": 3, "stream": True, **body}) as response:
        assert response.status == 200, await response.text()
        events = (await response.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


async def test_an_echoed_prompt_has_log_probabilities_but_for_its_first_token(fleet: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("hello world")
    length = len(ids)
    for prompt in ("hello world", ids):
        (choice,) = (await complete(fleet, prompt=prompt, echo=True, logprobs=1))["choices"]
        logprobs = choice["logprobs"]
        assert choice["text"] == "hello world" + tokenizer.decode(ids[:2])
        assert logprobs["token_logprobs"] == [None, *(-1.0 - number for number in range(length - 1)), -0.5, -0.5]
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert logprobs["top_logprobs"][0] is None
        assert all(1 <= len(top) <= 2 for top in logprobs["top_logprobs"][1:])
        for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
            assert choice["text"][offset:].startswith(token)
        assert choice["prompt_logprobs"] is None, "nobody asked for that field"
    assert fleet.worker.generates[-1].sampling.prompt_logprobs == 1


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_begins_each_choice_with_the_echoed_prompt(fleet: Any, tokenizer: Any, n: int) -> None:
    texts = ["hello world", "fox"]
    body = {"prompt": texts, "echo": True, "logprobs": 0, "n": n}
    whole = (await complete(fleet, **body))["choices"]
    chunks = await chunks_of(fleet, "/v1/completions", **body | {"max_tokens": 2})
    assert len(whole) == 2 * n
    for choice in whole:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for part in own for value in part["logprobs"][column]] == choice["logprobs"][column]
    asked = [generate.sampling.HasField("prompt_logprobs") for generate in fleet.worker.generates]
    assert asked == ([True] + [False] * (n - 1)) * 4, "the prompt is computed once for all choices"


@pytest.mark.parametrize("stream", [False, True])
async def test_without_an_answer_there_is_only_the_prompt(fleet: Any, tokenizer: Any, stream: bool) -> None:
    ids = tokenizer.encode("hello world")
    body: dict[str, Any] = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0, "seed": 1234}
    if stream:
        *_, chunk = await chunks_of(fleet, "/v1/completions", **body)
        (choice,) = chunk["choices"]
    else:
        answer = await complete(fleet, **body)
        (choice,) = answer["choices"]
        assert answer["usage"]["completion_tokens"] == 0
    assert (choice["text"], choice["finish_reason"]) == ("hello world", "length")
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    (choice,) = (await complete(fleet, prompt="hello", echo=True, max_tokens=0))["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("hello", "length", None)


async def test_a_prompt_that_fills_the_context_can_be_scored(fleet: Any) -> None:
    answer = await complete(fleet, prompt=[5] * 64, prompt_logprobs=0, max_tokens=0)
    assert len(answer["choices"][0]["prompt_logprobs"]) == 64
    status, answer = await fleet.post(
        "/v1/completions", {"model": "tiny", "prompt": [5] * 65, "prompt_logprobs": 0, "max_tokens": 0}
    )
    assert (status, answer["error"]["param"]) == (400, "prompt")


async def test_prompt_log_probabilities_are_named_by_id(fleet: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("hello world")
    (choice,) = (await complete(fleet, prompt="hello world", prompt_logprobs=2))["choices"]
    first, second, *_ = choice["prompt_logprobs"]
    assert first is None and len(choice["prompt_logprobs"]) == len(ids)
    assert second == {
        str(ids[1]): {"logprob": -1.0, "rank": 1, "decoded_token": tokenizer.decode_token(ids[1])},
        "10": {"logprob": -0.25, "rank": 1, "decoded_token": tokenizer.decode_token(10)},
        "11": {"logprob": -1.25, "rank": 2, "decoded_token": tokenizer.decode_token(11)},
    }
    assert choice["logprobs"] is None
    (choice,) = (await complete(fleet, prompt="hello world", prompt_logprobs=0, echo=True, logprobs=2))["choices"]
    assert all(len(position) == 1 for position in choice["prompt_logprobs"][1:])
    assert all(len(top) >= 2 for top in choice["logprobs"]["top_logprobs"][1:])
    answer = await complete_chat(fleet, prompt_logprobs=1)
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    (choice,) = (await complete(fleet, prompt=[7], prompt_logprobs=1))["choices"]
    assert choice["prompt_logprobs"] == [None]


async def test_more_candidates_than_an_answer_may_have_are_refused(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.controller.gateway.api.logprobs.MAX_PROMPT_CANDIDATES", 60)
    await complete(fleet, prompt=[5] * 20, prompt_logprobs=2)
    body = {"model": "tiny", "prompt": [[5] * 20, [5]], "prompt_logprobs": 2}
    status, answer = await fleet.post("/v1/completions", body)
    assert (status, answer["error"]["param"]) == (400, "prompt_logprobs")
    assert "63" in answer["error"]["message"] and "60" in answer["error"]["message"]


async def complete_chat(fleet: Any, **body: Any) -> dict[str, Any]:
    status, answer = await fleet.post(
        "/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, **body}
    )
    assert status == 200, answer
    return dict(answer)


async def test_token_ids_are_returned_when_asked_for_and_null_else(fleet: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("hello world")
    (choice,) = (await complete(fleet, prompt="hello world", return_token_ids=True))["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, ids[:2])
    (choice,) = (await complete(fleet, prompt="hello world"))["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"], choice["prompt_logprobs"]) == (None, None, None)
    answer = await complete_chat(fleet, return_token_ids=True)
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    assert answer["choices"][0]["token_ids"] == answer["prompt_token_ids"][:2]
    answer = await complete_chat(fleet)
    assert (answer["prompt_token_ids"], answer["prompt_logprobs"], answer["choices"][0]["token_ids"]) == (None,) * 3


async def test_streams_return_the_prompts_ids_once_and_then_each_token(fleet: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("hello world")
    chunks = await chunks_of(fleet, "/v1/completions", prompt="hello world", return_token_ids=True)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice.get("prompt_token_ids") for choice in choices] == [ids] + [None] * (len(choices) - 1)
    assert [token_id for choice in choices for token_id in choice["token_ids"]] == ids[:3]
    chunks = await chunks_of(fleet, "/v1/chat/completions", messages=MESSAGES, return_token_ids=True)
    prompt = chunks[0]["prompt_token_ids"]
    assert prompt and not any(chunk["prompt_token_ids"] for chunk in chunks[1:])
    tokens = [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"] or []]
    assert tokens == prompt[:3]


async def test_tokens_can_be_named_by_their_ids(fleet: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("hello world")
    body = {"logprobs": 1, "return_tokens_as_token_ids": True}
    (choice,) = (await complete(fleet, prompt="hello world", **body))["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in ids[:2]]
    assert list(choice["logprobs"]["top_logprobs"][0]) == [f"token_id:{ids[0]}"]
    answer = await complete_chat(fleet, logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)
    (token, _) = answer["choices"][0]["logprobs"]["content"]
    assert token["token"] == token["top_logprobs"][0]["token"] and token["token"].startswith("token_id:")
    assert bytes(token["bytes"]).decode()


async def test_named_candidates_reach_the_worker(fleet: Any) -> None:
    await complete(fleet, prompt="hello", logprob_token_ids=[9, 7, 9])
    sampling = fleet.worker.generates[-1].sampling
    assert list(sampling.logprob_token_ids) == [9, 7] and sampling.HasField("logprobs")


async def test_every_chunk_has_the_usage_so_far_if_asked_for(fleet: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in (("/v1/completions", {"prompt": "hello"}), ("/v1/chat/completions", {"messages": MESSAGES})):
        chunks = await chunks_of(fleet, path, **body, stream_options=options)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 3
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == chunks[-2]["usage"]
        assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in chunks)
        chunks = await chunks_of(fleet, path, **body, stream_options={"continuous_usage_stats": True})
        assert not any("usage" in chunk for chunk in chunks), "it says how include_usage is done"


async def test_the_best_of_several_answers_are_chosen(fleet: Any, tokenizer: Any) -> None:
    answer = await complete(fleet, prompt=["hello", "fox"], best_of=3, n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 12, "all that were generated count"
    assert [generate.sampling.choice for generate in fleet.worker.generates] == [0, 1, 2, 0, 1, 2]
    answer = await complete_chat(fleet, best_of=2)
    assert len(answer["choices"]) == 1


def answer_of(index: int, *logprobs: float) -> ChoiceDelta:
    return ChoiceDelta(
        index=index,
        text=str(index),
        token_ids=[0] * len(logprobs),
        logprobs=[TokenLogprobs(logprob, 1, (), ()) for logprob in logprobs],
        finish_reason="stop",
        stop_reason=None,
    )


def test_the_best_answers_have_the_highest_mean_log_probability() -> None:
    answers = [
        answer_of(0, -1.0, -3.0),
        answer_of(1, -1.5),
        answer_of(2),
        answer_of(3, -9.0),
        answer_of(4),
        answer_of(5),
    ]
    chosen = best_of(answers, 3, 2)
    assert [(delta.index, delta.text) for delta in chosen] == [(0, "1"), (1, "0"), (2, "3"), (3, "4")]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_ends_inside_a_character_keeps_its_tokens_and_offsets(
    fleet: Any, tokenizer: Any, stream: bool
) -> None:
    ids = tokenizer.encode("a😀b")
    assert len(ids) == 6, "the character has four tokens"
    for count, text in ((2, "a\ufffd"), (4, "a\ufffd"), (5, "a😀"), (6, "a😀b")):
        body = {"prompt": "a😀b", "logprobs": 0, "max_tokens": count}
        if stream:
            choices = [chunk["choices"][0] for chunk in await chunks_of(fleet, "/v1/completions", **body)]
        else:
            choices = (await complete(fleet, **body))["choices"]
        tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
        offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
        assert "".join(choice["text"] for choice in choices) == text
        assert tokens == ["a", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80", "b"][:count]
        assert offsets == [0, 1, 1, 1, 1, 2][:count]
        answer = await complete_chat(fleet, logprobs=True, max_tokens=count)
        assert len(answer["choices"][0]["logprobs"]["content"]) == count


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_ends_inside_a_character_is_completed_by_its_answer(
    fleet: Any, tokenizer: Any, stream: bool
) -> None:
    ids = tokenizer.encode("a😀b")
    fleet.worker.answer = ids[3:]
    body = {"prompt": ids[:3], "echo": True, "logprobs": 0}
    for count, text in ((0, "a\ufffd"), (3, "a😀b")):
        if stream:
            choices = [
                chunk["choices"][0] for chunk in await chunks_of(fleet, "/v1/completions", **body, max_tokens=count)
            ]
        else:
            choices = (await complete(fleet, **body, max_tokens=count))["choices"]
        assert "".join(choice["text"] for choice in choices) == text
        offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
        assert offsets == [0, 1, 1, 1, 1, 2][: 3 + count]


async def test_a_prompt_is_scored_again_by_another_worker(new_fleet: Any, tokenizer: Any) -> None:
    fleet = await new_fleet(num_workers=2)
    for worker in fleet.workers:
        worker.permits = 0
    ids = tokenizer.encode("hello world")
    asking = asyncio.create_task(complete(fleet, prompt=ids, prompt_logprobs=1))
    await fleet.until(lambda: any(worker.running for worker in fleet.workers))
    lost = next(worker for worker in fleet.workers if worker.running)
    other = next(worker for worker in fleet.workers if worker is not lost)
    other.permits = None
    await lost.kill()
    (choice,) = (await asking)["choices"]
    assert len(choice["prompt_logprobs"]) == len(ids)
