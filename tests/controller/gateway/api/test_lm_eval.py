"""Requests as lm-evaluation-harness's `local-completions` sends them, over a real engine: the log-likelihoods of
transformers and peft, as its `hf` model computes them.

For a context and a continuation it sends their tokens with `echo`, and reads the continuation's part of the columns.
With `max_tokens` 1 the last position is of the sampled token and is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from real_worker import MODELS


@pytest.fixture
def fleet(real_fleet: Any) -> Any:
    return real_fleet


def of_choice(choice: dict[str, Any], num_context: int, end: int | None) -> tuple[float, bool]:
    """Return the log-likelihood of the continuation, and whether each of its tokens is the best."""
    values = choice["logprobs"]["token_logprobs"][num_context:end]
    tops = choice["logprobs"]["top_logprobs"][num_context:end]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


def of_reference(model: Any, token_ids: Sequence[int], num_context: int) -> tuple[float, bool]:
    with torch.no_grad():
        rows = model(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)[num_context - 1 : -1]
    continuation = torch.tensor(token_ids[num_context:])
    is_greedy = bool((rows.argmax(dim=-1) == continuation).all())
    return float(rows.gather(1, continuation[:, None]).sum()), is_greedy


def pairs(reference: Any) -> list[tuple[list[int], int]]:
    """Return sequences and how many of their tokens are the context; every second one is continued greedily."""
    drawn = torch.Generator().manual_seed(5)
    sequences = []
    for number, length in enumerate((3, 17, 40, 90, 1, 60)):
        context = torch.randint(3, 131, (length,), generator=drawn).tolist()
        continuation = torch.randint(3, 131, (5,), generator=drawn).tolist()
        if number % 2:
            continuation = tiny.greedy(reference, context, 5)
        sequences.append((context + continuation, length))
    return sequences


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("model", MODELS)
async def test_log_likelihoods_are_those_of_transformers_and_peft(
    fleet: Any, references: dict[str, Any], model: str, max_tokens: int
) -> None:
    sequences = pairs(references[model])
    body = {
        "model": model,
        "prompt": [token_ids for token_ids, _ in sequences],
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    for _ in range(2):  # the second time the prompts are in the prefix cache
        status, answer = await fleet.post("/v1/completions", body)
        assert status == 200, answer
        for choice, (token_ids, num_context) in zip(answer["choices"], sequences, strict=True):
            expected, is_greedy = of_reference(references[model], token_ids, num_context)
            value, was_greedy = of_choice(choice, num_context, -1 if max_tokens else None)
            assert value == pytest.approx(expected, abs=5 * tiny.TOLERANCE)
            assert was_greedy is is_greedy
    assert {of_reference(references[model], *pair)[1] for pair in sequences} == {True, False}


async def test_a_prompt_as_text_is_scored_as_its_tokens(fleet: Any, references: dict[str, Any]) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    body = {"model": "linears", "prompt": text, "max_tokens": 0, "logprobs": 1, "echo": True, "return_token_ids": True}
    status, answer = await fleet.post("/v1/completions", body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    assert choice["text"] == text and "".join(choice["logprobs"]["tokens"]) == text
    value, _ = of_choice(choice, 1, None)
    expected, _ = of_reference(references["linears"], choice["prompt_token_ids"], 1)
    assert value == pytest.approx(expected, abs=len(choice["prompt_token_ids"]) * tiny.TOLERANCE)
    assert answer["usage"]["completion_tokens"] == 0
