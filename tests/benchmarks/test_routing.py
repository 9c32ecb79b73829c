"""The simulated fleet: its times add up, and the gateway's router is the best policy in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks are run from the repository, never installed

from benchmarks.fleet import Arrival, Fleet, WorkerModel
from benchmarks.simulate_routing import POLICIES, QUICK, SCENARIOS, Scenario, run
from lorafleet.controller.gateway.routing.worker_view import Tier


def test_a_request_alone_takes_its_load_its_prompt_and_a_step() -> None:
    model = WorkerModel()
    outcome = Fleet(1, model, POLICIES["ours"](), slowdowns={}).run([Arrival(0.0, "a", 64, 36, 5)])
    step_s = model.step_s + model.sequence_s + 100 * model.prompt_token_s
    assert outcome.first_token_s == [pytest.approx(model.disk_load_s + step_s)]
    assert outcome.found[Tier.DISK] == 1


def test_the_second_one_finds_adapter_and_prefix() -> None:
    model = WorkerModel()
    arrivals = [Arrival(0.0, "a", 64, 36, 5), Arrival(10.0, "a", 64, 36, 5)]
    outcome = Fleet(1, model, POLICIES["ours"](), slowdowns={0: 2.0}).run(arrivals)
    step_s = 2.0 * (model.step_s + model.sequence_s + 36 * model.prompt_token_s)
    assert outcome.first_token_s[1] == pytest.approx(step_s)
    assert (outcome.found[Tier.DEVICE], outcome.num_cached_tokens) == (1, 64)


def test_one_seat_serves_one_request_after_the_other() -> None:
    model = WorkerModel(num_seats=1)
    arrivals = [Arrival(0.0, "", 0, 10, 3), Arrival(0.0, "", 0, 10, 3)]
    first, second = Fleet(1, model, POLICIES["round-robin"](), slowdowns={}).run(arrivals).first_token_s
    decode_s = model.step_s + model.sequence_s
    assert first == pytest.approx(decode_s + 10 * model.prompt_token_s)
    assert second == pytest.approx(2 * first + 2 * decode_s)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_router_is_the_best_policy_or_within_a_twentieth_of_it(scenario: Scenario) -> None:
    outcomes = {policy: run(scenario, QUICK, policy) for policy in POLICIES}
    for share in (0.5, 0.99):
        times = {policy: outcome.percentile(share) for policy, outcome in outcomes.items()}
        assert times["ours"] <= 1.05 * min(times.values()), times
