"""Limits of rules about tokens, whoever makes them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.scheduling.sampling_options import SamplingOptions
from lorafleet.workers.scheduling.token_rules import MAX_ALLOWED, MAX_BAD_WORD_FORMS, MAX_BAD_WORD_TOKENS, MAX_BIASED


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("logit_bias", ((5, 100.5),), "token id 5 is 100.5; it must be between -100 and 100"),
        ("logit_bias", ((5, math.nan),), "nan"),
        ("logit_bias", ((5, -math.inf),), "-inf"),
        ("logit_bias", tuple((token, 1.0) for token in range(MAX_BIASED + 1)), "the limit is 1024"),
        ("allowed_token_ids", frozenset(range(MAX_ALLOWED + 1)), "the limit is 16384"),
        ("bad_words", ((1,), ()), "a word of 0 tokens"),
        ("bad_words", ((1,) * (MAX_BAD_WORD_TOKENS + 1),), "tokens; give 1 to"),
        ("bad_words", ((1,),) * (MAX_BAD_WORD_FORMS + 1), "the limit is 512"),
    ],
)
def test_limits_name_the_field(field: str, value: Any, part: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingOptions(max_tokens=1, **{field: value})
    assert caught.value.param == field and part in caught.value.message


def test_the_ends_of_the_range_are_in_it() -> None:
    assert SamplingOptions(max_tokens=1, logit_bias=((5, 100.0), (6, -100.0))).logit_bias
