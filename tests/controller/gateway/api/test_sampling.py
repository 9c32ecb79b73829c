"""The order of defaults of a sampling field; the API has all fields."""

from __future__ import annotations

import dataclasses

import pytest

from lorafleet.controller.gateway.api.sampling import sampling_params
from lorafleet.controller.gateway.api.schema import GenerateFields, SamplingFields
from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.params import SamplingParams

# Each endpoint has its own, or it is made of several fields.
OTHERS = {"max_tokens", "logprobs", "grammar", "structured_outputs"}


def test_a_request_may_give_whatever_a_caller_of_the_library_may() -> None:
    offline = {field.name for field in dataclasses.fields(SamplingParams) if field.init}
    assert set(SamplingFields.__struct_fields__) == offline - OTHERS
    assert "max_tokens" in GenerateFields.__struct_fields__


def test_the_requests_value_counts_then_the_models_then_openais() -> None:
    fields = SamplingFields(temperature=0.0, top_k=None)
    params = sampling_params(fields, {"temperature": 0.25, "top_k": 40}, max_tokens=None, logprobs=2)
    assert params == SamplingParams(temperature=0.0, top_k=40, max_tokens=None, logprobs=2)


def test_a_value_out_of_range_is_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"top_p is 2\.0; it must be greater than 0 and at most 1"):
        sampling_params(SamplingFields(top_p=2.0), {}, max_tokens=1, logprobs=None)
