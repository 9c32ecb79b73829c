"""Fields say in their types what they may be, and one check holds all of them to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from lorafleet.workers.engine.ranges import Allowed, Range, allowed_of, check_fields, check_integer
from lorafleet.workers.errors import InvalidRequestError


@dataclass
class Fields:
    count: Annotated[int, Range(1, 16)] = 1
    share: Annotated[float, Range(0.0, 1.0, is_open=True)] = 0.5
    limit: Annotated[int, Range(0, 2**64)] | None = None
    flag: bool = False
    name: str = ""  # says nothing


@dataclass
class More(Fields):
    penalty: Annotated[float, Range(-2.0, 2.0)] = 0.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 1),
        ("count", 16),
        ("share", 1),
        ("share", 5e-324),
        ("share", 1.0),
        ("limit", None),
        ("limit", 2**64),
        ("flag", True),
        ("name", 5),
        ("penalty", -2),
    ],
)
def test_what_is_in_its_range_passes(field: str, value: Any) -> None:
    check_fields(More(**{field: value}))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("count", 0, "count is 0; it must be between 1 and 16."),
        ("count", 17, "count is 17; it must be between 1 and 16."),
        ("count", 1.0, "count is 1.0; it must be an integer."),
        ("count", True, "count is True; it must be an integer."),
        ("count", None, "count is None; it must be an integer."),
        ("share", 0, "share is 0; it must be greater than 0 and at most 1."),
        ("share", 0.0, "share is 0.0; it must be greater than 0 and at most 1."),
        ("share", math.nan, "share is nan; it must be greater than 0 and at most 1."),
        ("share", "1", "share is '1'; it must be a number."),
        ("share", False, "share is False; it must be a number."),
        ("limit", -1, f"limit is -1; it must be between 0 and {2**64}."),
        ("flag", 1, "flag is 1; it must be true or false."),
        ("flag", None, "flag is None; it must be true or false."),
        ("penalty", math.inf, "penalty is inf; it must be between -2 and 2."),
    ],
)
def test_what_is_not_is_named_with_its_range(field: str, value: Any, said: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_fields(More(**{field: value}))
    assert (caught.value.param, caught.value.message) == (field, said)


def test_a_class_has_what_its_base_has() -> None:
    assert allowed_of(Fields).keys() == {"count", "share", "limit", "flag"}
    assert allowed_of(More) == {**allowed_of(Fields), "penalty": Allowed(float, Range(-2.0, 2.0), may_be_none=False)}


def test_a_range_may_be_told_of_a_value_by_another_name() -> None:
    with pytest.raises(InvalidRequestError, match="top_logprobs is 17; it must be between 1 and 16"):
        allowed_of(Fields)["count"].check("top_logprobs", 17)
    with pytest.raises(InvalidRequestError, match="id is -1; it must be between 0 and 5"):
        check_integer("id", -1, 0, 5)
