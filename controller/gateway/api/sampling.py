"""A request's sampling parameters, from the fields that chat and completions share.

Owns: the order of defaults (the request's, the model's, OpenAI's). Leaves to others: ranges and the context's length
(workers/params.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafleet.controller.gateway.api.schema import SamplingFields
from lorafleet.workers.params import SamplingParams

_FIELDS = SamplingFields.__struct_fields__


def sampling_params(
    fields: SamplingFields,
    defaults: Mapping[str, float | int],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    grammar: str = "",
) -> SamplingParams:
    """Return the parameters. defaults: the model's. grammar: a checked one.

    Raises InvalidRequestError for a value out of range.
    """
    values: dict[str, Any] = dict(defaults)
    values |= {name: value for name in _FIELDS if (value := getattr(fields, name)) is not None}
    return SamplingParams(**values, max_tokens=max_tokens, logprobs=logprobs, grammar=grammar)
