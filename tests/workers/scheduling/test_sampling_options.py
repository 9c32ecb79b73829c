"""The engine's sampling options."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lorafleet.workers.errors import InvalidRequestError
from lorafleet.workers.params import SamplingParams
from lorafleet.workers.scheduling.sampling_options import MAX_INT, SHARED_FIELDS, Sampling, SamplingOptions


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", -1), ("max_tokens", MAX_INT + 1), ("temperature", -1.0), ("top_k", -2)]
)
def test_ranges_hold_whoever_makes_them(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingOptions(**{"max_tokens": 1, field: value})
    assert caught.value.param == field


def test_all_candidates_are_kept_in_one_way() -> None:
    assert SamplingOptions(max_tokens=1, top_k=-1) == SamplingOptions(max_tokens=1, top_k=0)


def test_callers_and_the_engine_share_the_fields_and_their_defaults() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Sampling)}
    assert tuple(defaults) == SHARED_FIELDS
    for kind in (SamplingParams, SamplingOptions):
        own = {field.name: field.default for field in dataclasses.fields(kind)}
        assert {name: own[name] for name in SHARED_FIELDS} == defaults


def test_a_shared_field_reaches_the_engine() -> None:
    asked: dict[str, Any] = {
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logprobs": 3,
        "prompt_logprobs": 4,
        "ignore_eos": True,
        "grammar": 'start: "a"',
    }
    assert asked.keys() == set(SHARED_FIELDS)
    options = SamplingParams(**asked).options(num_prompt_tokens=1, max_model_len=64, vocab_size=10, seed=0, choice=0)
    assert {name: getattr(options, name) for name in SHARED_FIELDS} == asked


def test_only_the_first_choice_asks_for_the_log_probabilities_of_the_prompt() -> None:
    params = SamplingParams(n=2, prompt_logprobs=1)
    options = [
        params.options(num_prompt_tokens=1, max_model_len=64, vocab_size=10, seed=0, choice=choice) for choice in (0, 1)
    ]
    assert [option.prompt_logprobs for option in options] == [1, None]
