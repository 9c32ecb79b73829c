"""From a request's fields to what the engine is asked for: one `GenerateRequest` for each prompt.

Owns: what comes from where (the fields, the tenant, the model). Leaves to others: ranges (workers/params.py,
workers/engine/request.py), each choice's own part (placing.py), the wire (workers/request_wire.py).

A field that the API and `GenerateRequest` call the same is carried as it is: nothing here names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lorafleet.controller.gateway.schema import GenerateFields
from lorafleet.controller.gateway.served_model import ServedModel
from lorafleet.controller.gateway.tenants import Tenant
from lorafleet.workers.engine.request import GenerateRequest
from lorafleet.workers.errors import ContextLengthError
from lorafleet.workers.params import SamplingParams

_API_FIELDS = GenerateFields.__struct_fields__
_CARRIED = [field.name for field in dataclasses.fields(GenerateRequest) if field.name in _API_FIELDS]


def generate_requests(
    prompts: Sequence[Sequence[int]],
    fields: GenerateFields,
    params: SamplingParams,
    model: ServedModel,
    *,
    request_id: str,
    tenant: Tenant,
    draw_seed: Callable[[], int],
    prompt_field: str,
) -> list[GenerateRequest]:
    """One for each prompt, as its first choice. draw_seed: for prompts of a request that gives none. prompt_field: what
    an error about a prompt names. Raises what is wrong with any of them."""
    carried: dict[str, Any] = {name: value for name in _CARRIED if (value := getattr(fields, name)) is not None}
    carried["priority"] = tenant.priority_of(fields.priority)
    entry = model.entry
    requests = []
    for prompt in prompts:
        model.check_prompt(prompt, prompt_field)
        try:
            sampling = params.options(
                num_prompt_tokens=len(prompt),
                max_model_len=model.max_model_len,
                vocab_size=entry.vocab_size,
                seed=draw_seed(),
                choice=0,
                eos_token_ids=model.text.tokenizer.eos_token_ids,
            )
        except ContextLengthError as error:
            if error.param == "prompt":
                error.param = prompt_field
            raise
        requests.append(
            GenerateRequest(
                request_id,
                tuple(prompt),
                sampling,
                entry.digest or None,
                composition=tuple((part.digest, weight) for part, weight in entry.composition),
                tenant=tenant.name,
                tenant_weight=tenant.weight,
                adapter_weight=entry.weight,
                **carried,
            )
        )
    return requests
