"""Beam search over HTTP and a real engine gives the sequences of transformers' and peft's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from real_worker import MODELS

PROMPT = [5, 60, 33, 12, 90, 41, 7]
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def fleet(real_fleet: Any) -> Any:
    return real_fleet


def searched(model: Any, prompt: list[int], width: int, max_tokens: int, **options: Any) -> list[list[int]]:
    """Return the reference's sequences, best first."""
    sequences = tiny.beams(model, prompt, width, max_tokens, **options)
    given = options.get("eos_token_id", 1)
    ends = set() if given is None else {given} if isinstance(given, int) else set(given)
    lengths = [
        next((i for i, token_id in enumerate(tokens, 1) if token_id in ends), max_tokens) for tokens in sequences
    ]
    return [tokens[:length] for tokens, length in zip(sequences, lengths, strict=True)]


async def answer(fleet: Any, path: str, **body: Any) -> dict[str, Any]:
    status, whole = await fleet.post(path, {"model": "base", "use_beam_search": True, "return_token_ids": True, **body})
    assert status == 200, whole
    return dict(whole)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("width", "asked", "reference"),
    [
        (2, {}, {}),
        (4, {"length_penalty": 0.5}, {"length_penalty": 0.5}),
        (4, {"length_penalty": -1.0, "early_stopping": True}, {"length_penalty": -1.0, "early_stopping": True}),
        (3, {"length_penalty": 2.0, "early_stopping": "never"}, {"length_penalty": 2.0, "early_stopping": "never"}),
        (3, {"stop_token_ids": [20, 30, 40]}, {"eos_token_id": [1, 20, 30, 40]}),
        (3, {"stop_token_ids": [20, 30, 40], "min_tokens": 6}, {"eos_token_id": [1, 20, 30, 40], "min_new_tokens": 5}),
        (5, {"ignore_eos": True}, {"eos_token_id": None}),
    ],
)
async def test_the_beams_are_those_of_transformers_and_peft(
    fleet: Any,
    references: dict[str, Any],
    model: str,
    width: int,
    asked: dict[str, Any],
    reference: dict[str, Any],
) -> None:
    expected = searched(references[model], PROMPT, width, 10, **reference)
    body = {"model": model, "prompt": PROMPT, "n": width, "max_tokens": 10, "logprobs": 1, **asked}
    whole = await answer(fleet, "/v1/completions", **body)
    assert [choice["token_ids"] for choice in whole["choices"]] == expected
    ends = {1, *asked.get("stop_token_ids", ())} if "ignore_eos" not in asked else set()
    for choice in whole["choices"]:
        ended = choice["token_ids"][-1] in ends
        assert choice["finish_reason"] == ("stop" if ended else "length")
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])
    with torch.no_grad():
        best = torch.tensor([PROMPT + expected[0]])
        rows = references[model](best).logits[0].log_softmax(dim=-1)[len(PROMPT) - 1 : -1]
    values = rows.gather(1, torch.tensor(expected[0])[:, None])[:, 0].tolist()
    assert whole["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(values, abs=tiny.TOLERANCE)
    assert whole["usage"]["completion_tokens"] == sum(map(len, expected))


async def test_several_prompts_are_searched_side_by_side_and_the_best_of_the_beams_returned(
    fleet: Any, references: dict[str, Any]
) -> None:
    prompts = [PROMPT, [9, 8, 7], list(range(3, 60))]
    body = {"prompt": prompts, "best_of": 4, "n": 2, "max_tokens": 6, "echo": True, "logprobs": 0}
    whole = await answer(fleet, "/v1/completions", **body)
    expected = [searched(references["base"], prompt, 4, 6)[:2] for prompt in prompts]
    assert [choice["token_ids"] for choice in whole["choices"]] == [tokens for beams in expected for tokens in beams]
    assert [choice["index"] for choice in whole["choices"]] == list(range(6))
    for choice, prompt in zip(whole["choices"], (prompt for prompt in prompts for _ in range(2)), strict=True):
        assert choice["prompt_token_ids"] == prompt
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + len(choice["token_ids"])
    assert whole["usage"]["prompt_tokens"] == sum(map(len, prompts))


async def test_chat_is_searched_too(fleet: Any, references: dict[str, Any]) -> None:
    body = {"messages": HELLO, "n": 2, "max_tokens": 5, "model": "linears", "temperature": 0.7, "top_p": 0.9}
    whole = await answer(fleet, "/v1/chat/completions", **body)
    expected = searched(references["linears"], whole["prompt_token_ids"], 2, 5)
    assert [choice["token_ids"] for choice in whole["choices"]] == expected
    assert all(choice["message"]["role"] == "assistant" for choice in whole["choices"])


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"stream": True}, "stream"),
        ({"stop": ["a"]}, "stop"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"logprob_token_ids": [5]}, "logprob_token_ids"),
        ({"n": 16, "stop_token_ids": [4, 5, 6, 7]}, "n"),
        ({"best_of": 16, "stop_token_ids": [4, 5, 6, 7]}, "best_of"),
        ({"max_tokens": 0, "echo": True}, "max_tokens"),
        ({"length_penalty": 100.0}, "length_penalty"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "length_penalty"),
        ({"use_beam_search": None, "early_stopping": True}, "early_stopping"),
    ],
)
async def test_what_does_not_fit_is_refused_by_name(fleet: Any, asked: dict[str, Any], param: str) -> None:
    body = {"model": "base", "prompt": "hello", "use_beam_search": True, "n": 2, **asked}
    status, whole = await fleet.post("/v1/completions", body)
    assert (status, whole["error"]["param"]) == (400, param), whole


async def test_a_search_has_a_time_limit_and_counts_as_one_request(new_fleet: Callable[..., Any]) -> None:
    fleet = await new_fleet(request_timeout_s=0.2)
    fleet.worker.permits = 1
    body = {"model": "tiny", "prompt": "hello", "use_beam_search": True, "n": 2, "max_tokens": 9}
    status, whole = await fleet.post("/v1/completions", body)
    assert status == 504, whole
    await fleet.until(lambda: not fleet.worker.running)
    fleet.worker.permits = None
    status, whole = await fleet.post("/v1/completions", body | {"max_tokens": 3})
    assert status == 200, whole
    _, page = await fleet.get("/metrics")
    counted = [line for line in page.splitlines() if line.startswith("lorafleet_e2e_request_latency_seconds_count")]
    assert [float(line.rsplit(" ", 1)[1]) for line in counted] == [1.0]


async def test_a_client_that_leaves_ends_its_search(new_fleet: Callable[..., Any]) -> None:
    fleet = await new_fleet()
    fleet.worker.permits = 0
    body = {"model": "tiny", "prompt": "hello", "use_beam_search": True, "n": 2, "max_tokens": 9}
    asking = asyncio.create_task(fleet.post("/v1/completions", body))
    await fleet.until(lambda: fleet.worker.running)
    asking.cancel()
    await fleet.until(lambda: not fleet.worker.running)
