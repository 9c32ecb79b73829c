"""The last place in a prompt where the invocation tokens begin."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.variants import calculate_alora_offsets

from lorafleet.workers.scheduling.activation import find_start


@pytest.mark.parametrize(
    ("prompt", "invocation", "start"),
    [
        ([5, 6, 7], [9], None),
        ([9], [9], 0),
        ([5, 9, 9], [9], 2),
        ([5, 9, 8, 9, 8, 4], [9, 8], 3),
        ([9, 8, 9], [9, 8], 0),  # the second is not whole
        ([9, 9, 9], [9, 9], 1),
        ([1, 2, 1, 2, 1], [1, 2, 1], 2),
        ([9], [9, 8], None),
        ([], [9], None),
    ],
)
def test_the_last_whole_occurrence_counts(prompt: list[int], invocation: list[int], start: int | None) -> None:
    assert find_start(prompt, invocation) == start


@given(st.lists(st.integers(1, 3), min_size=1, max_size=12), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_it_is_where_peft_finds_it(prompt: list[int], invocation: list[int]) -> None:
    config = {"default": LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=invocation)}
    (offset,) = calculate_alora_offsets(cast(PeftConfig, config), "default", torch.tensor([prompt]))
    assert find_start(prompt, invocation) == (None if offset is None else len(prompt) - offset)
