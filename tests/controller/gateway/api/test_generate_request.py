"""The engine's input, from the fields of an API request, its tenant and its model."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from lorafleet.controller.gateway.api.generate_request import generate_requests
from lorafleet.controller.gateway.api.schema import GenerateFields
from lorafleet.controller.gateway.api.served_model import ServedModel
from lorafleet.controller.gateway.routing.routing_table import ModelEntry
from lorafleet.controller.gateway.tenants import Tenant
from lorafleet.workers.errors import ContextLengthError, InvalidRequestError
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.text.model_text import ModelText


def entry(name: str, digest: str, **more: Any) -> ModelEntry:
    return ModelEntry(name=name, digest=digest, version=1, root="", parent="tiny", created=0, vocab_size=400, **more)


@pytest.fixture(scope="session")
def text(tokenizer_files: dict[str, bytes]) -> ModelText:
    return ModelText.from_files("tok-1", tokenizer_files)


def ask(
    text: ModelText,
    prompts: list[list[int]],
    model: ModelEntry,
    params: SamplingParams | None = None,
    tenant: Tenant | None = None,
    **fields: Any,
) -> list[GenerateRequest]:
    return generate_requests(
        prompts,
        GenerateFields(model=model.name, **fields),
        params or SamplingParams(),
        ServedModel(model, text, 64),
        request_id="r",
        tenant=tenant or Tenant(),
        draw_seed=count(100).__next__,
        prompt_field="prompt",
    )


def test_each_prompt_is_one_request_with_a_seed_of_its_own(text: ModelText) -> None:
    params = SamplingParams(max_tokens=None, temperature=0.5, stop_token_ids=[7])
    first, second = ask(text, [[5, 6], [8]], entry("sql", "d-sql", weight=2.0), params)
    assert (first.request_id, first.prompt_token_ids, second.prompt_token_ids) == ("r", (5, 6), (8,))
    assert (first.adapter, first.adapter_weight, first.composition) == ("d-sql", 2.0, ())
    assert (first.sampling.seed, second.sampling.seed) == (100, 101)
    assert (first.sampling.max_tokens, second.sampling.max_tokens) == (62, 63)
    assert first.sampling.stop_token_ids == {7} | text.tokenizer.eos_token_ids
    assert (first.sampling.temperature, first.sampling.choice) == (0.5, 0)


def test_what_the_api_calls_the_same_is_carried_and_a_tenants_priority_added(text: ModelText) -> None:
    tenant = Tenant("acme", weight=3.0, priority=10)
    (request,) = ask(text, [[5]], entry("tiny", ""), None, tenant, cache_salt="s", priority=2)
    assert (request.tenant, request.tenant_weight, request.priority, request.cache_salt) == ("acme", 3.0, 12, "s")
    assert request.adapter is None
    (request,) = ask(text, [[5]], entry("tiny", ""), None, tenant)
    assert (request.priority, request.cache_salt) == (10, None)


def test_a_composition_is_all_its_adapters(text: ModelText) -> None:
    parts = ((entry("sql", "d-sql"), 0.5), (entry("pirate", "d-pirate"), -1.0))
    (request,) = ask(text, [[5]], entry("tiny", "", composition=parts))
    assert request.composition == (("d-pirate", -1.0), ("d-sql", 0.5))
    assert (request.adapter, request.digests) == (None, ("d-pirate", "d-sql"))


@pytest.mark.parametrize(
    ("prompts", "fields", "param"),
    [
        ([[5], []], {}, "prompt"),
        ([[5], [400]], {}, "prompt"),
        ([[-1]], {}, "prompt"),
        ([[5]], {"cache_salt": ""}, "cache_salt"),
        ([[5]], {"cache_salt": "s" * 1025}, "cache_salt"),
        ([[5]], {"priority": 2**31}, "priority"),
    ],
)
def test_what_is_wrong_is_named(text: ModelText, prompts: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ask(text, prompts, entry("tiny", ""), **fields)
    assert caught.value.param == param


def test_a_prompt_without_room_for_an_answer_is_named_as_its_endpoint_calls_it(text: ModelText) -> None:
    with pytest.raises(ContextLengthError) as caught:
        generate_requests(
            [[5] * 64],
            GenerateFields(model="tiny"),
            SamplingParams(),
            ServedModel(entry("tiny", ""), text, 64),
            request_id="r",
            tenant=Tenant(),
            draw_seed=lambda: 0,
            prompt_field="messages",
        )
    assert caught.value.param == "messages"
