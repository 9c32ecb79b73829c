"""The size of a step shared by tenants, learnt from steps of a simulated machine."""

from __future__ import annotations

import pytest

from lorafleet.workers.scheduling.step_budget import FEW, MIN_TARGET_S, STRETCH, StepBudget


def learn(budget: StepBudget, fixed_s: float, token_s: float, num_steps: int = 200) -> None:
    """Full steps, and one in eight of a single token."""
    for number in range(num_steps):
        num_tokens = 1 if number % 8 == 0 else budget.num_tokens
        budget.book(fixed_s + token_s * num_tokens, num_tokens)


@pytest.mark.parametrize(
    ("fixed_s", "token_s", "target_s"),
    [
        (0.011, 0.0015, MIN_TARGET_S),  # a small model on two cores
        (0.006, 0.00003, MIN_TARGET_S),  # a GPU
        (0.1, 0.01, STRETCH * 0.11),  # a large model on a CPU
    ],
)
def test_a_full_step_takes_about_as_long_as_it_should(fixed_s: float, token_s: float, target_s: float) -> None:
    budget = StepBudget(100_000)
    learn(budget, fixed_s, token_s)
    step_s = fixed_s + token_s * budget.num_tokens
    assert 0.6 * target_s < step_s < 1.15 * target_s


def test_no_step_is_larger_than_any_may_be() -> None:
    budget = StepBudget(512)
    learn(budget, 0.001, 0.0)
    assert budget.num_tokens == 512


def test_what_takes_long_with_next_to_nothing_takes_hardly_longer_with_a_few_tokens() -> None:
    budget = StepBudget(512)
    for _ in range(100):
        budget.book(3.0, budget.num_tokens)
    assert budget.num_tokens >= FEW


def test_one_slow_step_does_not_say_much() -> None:
    budget = StepBudget(512)
    learn(budget, 0.01, 0.0005)
    before = budget.num_tokens
    budget.book(5.0, before)
    assert 0.6 * before < budget.num_tokens < before


def test_small_steps_that_are_fast_do_not_make_it_grow() -> None:
    budget = StepBudget(512)
    before = budget.num_tokens
    for _ in range(100):
        budget.book(0.01, 2)
    assert budget.num_tokens == before


def test_a_large_step_of_one_tenant_alone_says_nothing_if_it_is_slow() -> None:
    budget = StepBudget(512)
    before = budget.num_tokens
    budget.book(0.8, 512)
    assert budget.num_tokens == before
