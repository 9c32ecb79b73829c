"""Values that an option takes, and what is said of others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from lorafleet.workers.errors import ConfigError
from lorafleet.workers.options import check_options, flag_of, nested, nested_in, option, option_of, options_of


@dataclass(frozen=True)
class Inner:
    depth: int = option(1, minimum=1, maximum=3, help="")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Config:
    count: int = option(1, minimum=1, maximum=512, help="")
    share: float = option(0.5, above=0.0, maximum=1.0, help="")
    wait_s: float = option(0.0, minimum=1.0, maximum=60.0, off=0.0, help="")
    cache_bytes: int | None = option(None, minimum=1, maximum=100, help="")
    kind: str = option("a", choices=("a", "b"), help="")
    level: Literal["low", "high"] = option("low", help="")
    name: str | None = option(None, help="", flag="--known-as")
    is_on: bool = option(False, help="")
    page: int = option(8, choices=(8, 16), help="")
    filled_in: int = 0
    inner: Inner = nested(Inner)

    def __post_init__(self) -> None:
        check_options(self)


@pytest.mark.parametrize(
    "values",
    [
        {"count": 512},
        {"count": np.int64(4)},
        {"share": 1},
        {"share": np.float32(0.25)},
        {"wait_s": 0},
        {"wait_s": 60.0},
        {"cache_bytes": 100},
        {"cache_bytes": None},
        {"kind": "b"},
        {"level": "high"},
        {"name": "x"},
        {"is_on": True},
        {"page": 16},
        {"filled_in": -1},
    ],
)
def test_values_within_the_bounds_are_taken(values: dict[str, Any]) -> None:
    assert vars(Config(**values)).items() >= values.items()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": 0}, "--count is 0; it must be a whole number from 1 to 512."),
        ({"count": 513}, "--count is 513; it must be a whole number from 1 to 512."),
        ({"count": "8"}, "--count is '8'; it must be a whole number from 1 to 512."),
        ({"count": 2.5}, "--count is 2.5; it must be a whole number from 1 to 512."),
        ({"count": True}, "--count is True; it must be a whole number from 1 to 512."),
        ({"count": None}, "--count is None; it must be a whole number from 1 to 512."),
        ({"count": 10**9}, "--count is 1000000000; it must be a whole number from 1 to 512."),
        ({"count": 10**5000}, "--count is an integer of 16610 bits; it must be a whole number from 1 to 512."),
        ({"count": math.nan}, "--count is nan; it must be a whole number from 1 to 512."),
        ({"share": 0.0}, "--share is 0; it must be a number above 0, at most 1."),
        ({"share": math.nan}, "--share is nan; it must be a number above 0, at most 1."),
        ({"share": math.inf}, "--share is inf; it must be a number above 0, at most 1."),
        ({"share": "half"}, "--share is 'half'; it must be a number above 0, at most 1."),
        ({"share": 1j}, "--share is 1j; it must be a number above 0, at most 1."),
        ({"wait_s": 0.5}, "--wait-s is 0.5; it must be a number from 1 to 60, or 0."),
        ({"wait_s": -1.0}, "--wait-s is -1; it must be a number from 1 to 60, or 0."),
        ({"cache_bytes": 0}, "--cache-bytes is 0; it must be a number of bytes from 1 to 100."),
        ({"cache_bytes": "2GiB"}, "--cache-bytes is '2GiB'; it must be a number of bytes from 1 to 100."),
        ({"kind": "c"}, "--kind is 'c'; it must be one of a, b."),
        ({"kind": ["a"]}, "--kind is ['a']; it must be one of a, b."),
        ({"level": "mid"}, "--level is 'mid'; it must be one of low, high."),
        ({"name": 3}, "--known-as is 3; it must be text."),
        ({"is_on": "no"}, "--is-on is 'no'; it must be True or False."),
        ({"page": 9}, "--page is 9; it must be one of 8, 16."),
        ({"page": 8.0}, "--page is 8; it must be one of 8, 16."),
    ],
)
def test_other_values_are_refused_with_value_bounds_and_flag(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**values)
    assert caught.value.message == said


def test_a_long_value_is_quoted_in_part() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(kind="x" * 100_000)
    assert len(caught.value.message) < 300


def test_nested_options_are_their_owners_and_check_themselves() -> None:
    assert [(declared.name, declared.path) for declared in options_of(Config)][-1] == ("depth", ("inner",))
    assert nested_in(Config) == {"inner": Inner}
    with pytest.raises(ConfigError, match="--depth is 4"):
        Inner(depth=4)


def test_a_declaration_may_be_used_again_with_another_default_or_other_bounds() -> None:
    @dataclass(frozen=True)
    class Other:
        count: int = option_of(Config, "count", default=600, maximum=1000)
        share: float = option_of(Config, "share")

    count, share = options_of(Other)
    assert (count.default, count.bounds()) == (600, "from 1 to 1000")
    assert share == options_of(Config)[1]
    assert options_of(Config)[0].bounds() == "from 1 to 512"


def test_a_secret_is_not_in_the_repr() -> None:
    @dataclass(frozen=True)
    class Secret:
        key: str = option("s3cret", is_secret=True, help="")

    assert "s3cret" not in repr(Secret())


def test_a_flag_is_its_fields_name() -> None:
    assert flag_of("max_in_flight") == "--max-in-flight"
