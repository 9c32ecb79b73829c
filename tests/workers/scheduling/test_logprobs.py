"""Log-probabilities of prompts, in columns."""

from __future__ import annotations

import pytest

from lorafleet.workers.scheduling.logprobs import PromptLogprobs, TokenLogprobs


def test_parts_follow_one_another_and_are_read_token_by_token() -> None:
    logprobs = PromptLogprobs.of(2, [-1.0], [3], [7, 8], [-0.25, -0.5])
    logprobs.extend(PromptLogprobs.of(2, [-2.0], [1], [5, 6], [-2.0, -4.0]))
    assert len(logprobs) == 2
    assert list(logprobs) == [
        TokenLogprobs(-1.0, 3, (7, 8), (-0.25, -0.5)),
        TokenLogprobs(-2.0, 1, (5, 6), (-2.0, -4.0)),
    ]


def test_without_candidates_each_token_has_its_own_only() -> None:
    assert list(PromptLogprobs.of(0, [-1.0], [3])) == [TokenLogprobs(-1.0, 3, (), ())]


def test_parts_with_different_numbers_of_candidates_do_not_belong_together() -> None:
    with pytest.raises(AssertionError):
        PromptLogprobs.of(2).extend(PromptLogprobs.of(1))
