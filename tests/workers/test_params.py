"""Ranges, types and empty values of a caller's parameters: every bad value gives a short, named error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafleet.workers.errors import ContextLengthError, InvalidRequestError
from lorafleet.workers.params import MAX_STOP_TOKEN_IDS, LoRARequest, SamplingParams
from lorafleet.workers.scheduling.sampling_options import SamplingOptions
from lorafleet.workers.scheduling.token_rules import MAX_ALLOWED, MAX_BAD_WORDS, MAX_BIASED

HUGE = 10**5000  # Python refuses to write it out


BAD: list[tuple[str, Any, str]] = [
    ("n", 0, "n is 0"),
    ("n", HUGE, "16610 bits"),
    ("n", True, "n is True; it must be an integer"),
    ("n", None, "integer"),
    ("max_tokens", 0, "max_tokens is 0"),
    ("max_tokens", -HUGE, "bits"),
    ("min_tokens", -1, "-1"),
    ("min_tokens", 17, "more than max_tokens 16"),
    ("temperature", HUGE, "16610 bits"),
    ("temperature", float("nan"), "nan"),
    ("temperature", float("inf"), "inf"),
    ("temperature", "hot " * 1_000_000, "hot"),
    ("temperature", None, "number"),
    ("top_p", 0, "greater than 0"),
    ("top_p", float("-inf"), "-inf"),
    ("top_k", -2, "-2"),
    ("top_k", 0.5, "integer"),
    ("min_p", 1.5, "1.5"),
    ("seed", 2**64, "between"),
    ("seed", "a", "integer"),
    ("repetition_penalty", 0, "greater than 0"),
    ("presence_penalty", -2.5, "-2.5"),
    ("frequency_penalty", HUGE, "bits"),
    ("logprobs", 21, "21"),
    ("logprobs", [HUGE], "integer"),
    ("stop", "", "empty"),
    ("stop", ["a", ""], "empty"),
    ("stop", ["a"] * 17, "17"),
    ("stop", 5, "stop is 5"),
    ("stop", [5], "stop has 5"),
    ("stop", [["x" * 5_000_000]], "stop has"),
    ("stop", "x" * 257, "257"),
    ("stop_token_ids", 5, "stop_token_ids is 5"),
    ("stop_token_ids", "5", "'5'"),
    ("stop_token_ids", [-1], "-1"),
    ("stop_token_ids", [HUGE], "bits"),
    ("stop_token_ids", [1] * (MAX_STOP_TOKEN_IDS + 1), "1025"),
    ("logit_bias", [(5, 1)], "must be a mapping"),
    ("logit_bias", {"a": 1}, "'a'"),
    ("logit_bias", {"-5": 1}, "'-5'"),
    ("logit_bias", {-5: 1}, "-5"),
    ("logit_bias", {True: 1}, "True"),
    ("logit_bias", {5: "1"}, "token id 5 is '1'"),
    ("logit_bias", {5: True}, "token id 5 is True"),
    ("logit_bias", {5: 100.5}, "token id 5 is 100.5; it must be between -100 and 100"),
    ("logit_bias", {5: float("nan")}, "nan"),
    ("logit_bias", {5: -HUGE}, "bits"),
    ("logit_bias", {HUGE: 1}, "bits"),
    ("logit_bias", {"9" * 5_000_000: 1}, "999"),
    ("logit_bias", dict.fromkeys(range(MAX_BIASED + 1), 1.0), "1025"),
    ("allowed_token_ids", [], "empty"),
    ("allowed_token_ids", 5, "allowed_token_ids is 5"),
    ("allowed_token_ids", [-1], "-1"),
    ("allowed_token_ids", ["5"], "'5'"),
    ("allowed_token_ids", range(MAX_ALLOWED + 1), "16385"),
    ("bad_words", "word", "must be a list"),
    ("bad_words", [5], "bad_words has 5"),
    ("bad_words", [""], "empty"),
    ("bad_words", ["x" * 257], "257"),
    ("bad_words", ["x"] * (MAX_BAD_WORDS + 1), "257"),
    ("ignore_eos", 1, "ignore_eos is 1"),
    ("skip_special_tokens", "x" * 5_000_000, "true or false"),
    ("include_stop_str_in_output", None, "true or false"),
]


def test_a_bad_value_is_named_and_quoted_in_short() -> None:
    for name, value, part in BAD:
        with pytest.raises(InvalidRequestError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.param == name
        assert part in caught.value.message, caught.value.message
        assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("temperature", 0, 0.0),
        ("top_k", 0, 0),
        ("min_p", 0, 0.0),
        ("presence_penalty", 0, 0.0),
        ("seed", 0, 0),
        ("min_tokens", 0, 0),
        ("logprobs", 0, 0),
    ],
)
def test_zero_is_a_value(name: str, value: Any, wanted: Any) -> None:
    options = SamplingParams(**{name: value}).options(
        num_prompt_tokens=1, max_model_len=64, vocab_size=10, seed=99, choice=0
    )
    assert getattr(options, name) == wanted


@pytest.mark.parametrize("nothing", [None, (), [], frozenset()])
def test_no_stop_strings_or_tokens_may_be_written_in_any_way(nothing: Any) -> None:
    params = SamplingParams(stop=nothing, stop_token_ids=nothing)
    assert (params.stops, params.stop_ids) == ((), frozenset())


def options(params: SamplingParams, **more: Any) -> SamplingOptions:
    return params.options(num_prompt_tokens=1, max_model_len=64, vocab_size=10, seed=0, choice=0, **more)


@pytest.mark.parametrize(
    ("field", "value"),
    [("stop_token_ids", [1, 12, 11]), ("logit_bias", {12: 0.5, 3: 1}), ("allowed_token_ids", [12])],
)
def test_a_token_outside_the_vocabulary_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"{field} has 12; the vocabulary ends at 9") as caught:
        options(SamplingParams(**{field: value}))
    assert caught.value.param == field


def test_a_bad_word_with_a_token_that_the_model_has_not_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="bad_words has 10"):
        options(SamplingParams(bad_words=["x"]), bad_words=((1, 10),))


def test_rules_about_tokens_reach_the_engine_in_its_form() -> None:
    params = SamplingParams(logit_bias={"7": -100, "2": 0.5}, allowed_token_ids=(9, 2, 9), bad_words=["x"])
    made = options(params, bad_words=((1,), (2, 3)))
    assert (
        made.logit_bias == ((2, 0.5), (7, -100.0)) == options(SamplingParams(logit_bias={7: -100, 2: 0.5})).logit_bias
    )
    assert made.allowed_token_ids == {2, 9}
    assert made.bad_words == ((1,), (2, 3))
    assert params.words == ("x",)


def test_null_is_no_rule() -> None:
    none = SamplingParams(logit_bias=None, allowed_token_ids=None, bad_words=None)
    assert options(none) == options(SamplingParams())


def test_a_prompt_that_leaves_no_room_is_over_the_context() -> None:
    with pytest.raises(ContextLengthError, match="64 tokens leaves no room"):
        SamplingParams().options(num_prompt_tokens=64, max_model_len=64, vocab_size=10, seed=0, choice=0)


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        (("", 1, "a"), "lora_name"),
        (("a", 0, "a"), "lora_int_id"),
        (("a", True, "a"), "lora_int_id"),
        (("a", 1, ""), "lora_path"),
        ((5, 1, "a"), "lora_name"),
        (("a", 1, Path("/a")), "lora_path"),
    ],
)
def test_a_lora_request_says_which_field_is_wrong(arguments: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        LoRARequest(*arguments)
    assert caught.value.param == param
