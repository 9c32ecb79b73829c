"""The fields a request may have, and their limits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tenant", "t" * 257),
        ("tenant_weight", 0.0),
        ("tenant_weight", -1.0),
        ("tenant_weight", 1001.0),
        ("tenant_weight", math.nan),
        ("adapter_weight", 0.0),
        ("adapter_weight", math.inf),
        ("priority", 2**31),
        ("priority", -(2**31)),
    ],
)
def test_tenants_weights_and_priorities_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        GenerateRequest("r", (1,), SamplingOptions(max_tokens=1), **{field: value})
    assert caught.value.param == field
