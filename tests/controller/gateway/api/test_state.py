"""The parts of a gateway together, as its handlers use them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lorafleet.controller.gateway.api.state import INLINE_BYTES
from lorafleet.controller.gateway.tenants import Tenant
from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.params import SamplingParams


def generate(fleet: Any, prompts: list[list[int]], **params: Any) -> Any:
    state = fleet.state
    return state.generate(
        request_id="r",
        tenant=Tenant(),
        priority=None,
        cache_salt="",
        table=state.table,
        text=state.text,
        model=state.table.resolve("tiny"),
        prompts=prompts,
        params=SamplingParams(**params),
        prompt_field="prompt",
    )


async def test_nothing_is_submitted_before_every_prompt_is_checked(fleet: Any) -> None:
    for prompts, part in (([[5]] * 127 + [[10**9]], "1000000000"), ([[5], []], "empty"), ([[5], [-1]], "-1")):
        with pytest.raises(InvalidRequestError, match=part):
            async with generate(fleet, prompts, max_tokens=1):
                pytest.fail("it was submitted")
    assert fleet.worker.generates == []


async def test_choices_share_all_but_their_number(fleet: Any) -> None:
    async with generate(fleet, [[5, 6]], n=3, max_tokens=2, stop_token_ids=[9, 7], seed=11) as generation:
        await generation.gather()
    sent = sorted(fleet.worker.generates, key=lambda one: one.sampling.choice)
    assert [one.sampling.choice for one in sent] == [0, 1, 2]
    assert {tuple(one.prompt_token_ids) for one in sent} == {(5, 6)}
    assert {(one.sampling.seed, tuple(one.sampling.stop_token_ids)) for one in sent} == {
        (11, tuple(sorted({9, 7} | fleet.state.text.tokenizer.eos_token_ids)))
    }


async def test_small_inputs_are_handled_on_the_event_loop(fleet: Any) -> None:
    where = threading.current_thread
    assert await fleet.state.parse(Tenant(), INLINE_BYTES, where) is threading.current_thread()
    assert await fleet.state.parse(Tenant(), INLINE_BYTES + 1, where) is not threading.current_thread()
    assert await fleet.state.in_thread(Tenant(), 1, where) is not threading.current_thread()
