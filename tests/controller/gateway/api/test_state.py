"""The parts of a gateway together, as its handlers use them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lorafleet.controller.gateway.api.generate_request import generate_requests
from lorafleet.controller.gateway.api.schema import GenerateFields
from lorafleet.controller.gateway.api.served_model import ServedModel
from lorafleet.controller.gateway.api.state import INLINE_BYTES
from lorafleet.controller.gateway.tenants import Tenant
from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.params import SamplingParams


def generate(fleet: Any, prompts: list[list[int]], **options: Any) -> Any:
    state = fleet.state
    model = ServedModel(state.table.resolve("tiny"), state.text, state.table.max_model_len)
    params = SamplingParams(**options)
    requests = generate_requests(
        prompts,
        GenerateFields(model="tiny"),
        params,
        model,
        request_id="r",
        tenant=Tenant(),
        draw_seed=state.draw_seed,
        prompt_field="prompt",
    )
    return state.generate(requests, params, model)


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
