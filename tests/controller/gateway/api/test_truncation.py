"""Prompts cut to a number of tokens."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, slice(-3, None)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, slice(-3, None)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, slice(0, 3)),
        ({"truncate_prompt_tokens": -1}, slice(-62, None)),
        ({"truncate_prompt_tokens": 64, "max_tokens": 0}, slice(-64, None)),
    ],
)
async def test_a_prompt_is_cut_to_a_number_of_tokens(
    fleet: Any, tokenizer: Any, asked: dict[str, Any], kept: slice
) -> None:
    text = "hello world! the lazy dog. " * 20
    ids = tokenizer.encode(text)
    for prompt in (text, ids):
        (choice,) = (await answer(fleet, "/v1/completions", **{"prompt": prompt, **asked, "echo": True}))["choices"]
        assert list(fleet.worker.generates[-1].prompt_token_ids) == ids[kept]
        assert choice["text"].startswith(tokenizer.decode(ids[kept])), "what was cut off is not echoed"
    asked = asked | {"prompt_logprobs": 0}
    await answer(fleet, "/v1/chat/completions", messages=[{"role": "user", "content": text}], **asked)
    assert len(fleet.worker.generates[-1].prompt_token_ids) == len(ids[kept])


async def test_a_prompt_may_be_many_contexts_long_but_not_endless(fleet: Any) -> None:
    (choice,) = (await answer(fleet, "/v1/completions", prompt=[5] * 64 * 64, truncate_prompt_tokens=2))["choices"]
    assert choice["finish_reason"] == "length"
    for prompt in ([5] * (64 * 64 + 1), "the " * 100_000):
        body = {"model": "tiny", "prompt": prompt, "truncate_prompt_tokens": 2}
        status, whole = await fleet.post("/v1/completions", body)
        assert (status, whole["error"]["param"]) == (400, "prompt"), "4096 tokens are the limit"


async def test_a_prompt_that_fits_is_left_whole(fleet: Any, tokenizer: Any) -> None:
    (choice,) = (await answer(fleet, "/v1/completions", prompt="hello world", truncate_prompt_tokens=60, echo=True))[
        "choices"
    ]
    assert choice["text"].startswith("hello world")
    assert list(fleet.worker.generates[-1].prompt_token_ids) == tokenizer.encode("hello world")


async def answer(fleet: Any, path: str, **body: Any) -> dict[str, Any]:
    status, whole = await fleet.post(path, {"model": "tiny", "max_tokens": 2, **body})
    assert status == 200, whole
    return dict(whole)
