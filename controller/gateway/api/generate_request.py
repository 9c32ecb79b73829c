"""A request's fields as the engine's input: one `GenerateRequest` for each prompt.

Owns: the source of each field (the body, the tenant, the model). Leaves to others: ranges (workers/params.py,
workers/scheduling/request.py), each choice's own part (streams/placing.py), the wire (workers/request_wire.py).

A field with the same name in the API and in `GenerateRequest` is copied; it is not named here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lorafleet.controller.gateway.api.schema import GenerateFields
from lorafleet.controller.gateway.api.served_model import ServedModel
from lorafleet.controller.gateway.tenants import Tenant
from lorafleet.workers.errors import ContextLengthError
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.scheduling.token_rules import BadWords

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
    bad_words: BadWords = (),
) -> list[GenerateRequest]:
    """Return one request for each prompt, as its first choice. draw_seed: returns a seed for a prompt without one.
    prompt_field: the field that errors about a prompt name. Raises the errors of any of them."""
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
                bad_words=bad_words,
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
                text_digest=entry.text_digest if sampling.grammar else "",
                **carried,
            )
        )
    return requests
