"""What the scheduler promises, on traces of minutes that a virtual clock plays in seconds."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks are run from the repository, never installed

from benchmarks.simulate_scheduler import (
    SCENARIOS,
    Held,
    Scenario,
    Slow,
    base_rate,
    flood,
    line,
    overload,
    run,
    run_slow,
    shares,
)
from benchmarks.simulation import Arrival, Machine, Simulation, jain, largest_drift
from lorafleet.workers.engine.fairness import OUTPUT_TOKEN, PROMPT_TOKEN

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def vtc_bound(num_seats: int, num_prompt: int, num_output: int, weight: float = 1.0) -> float:
    """Theorem 4.4 of the paper: 2 max(w_p L, w_q M), L the longest prompt, M the tokens of a full batch."""
    batch_tokens = num_seats * (num_prompt + num_output)
    return 2 * max(PROMPT_TOKEN * num_prompt, OUTPUT_TOKEN * batch_tokens) / weight


def test_the_service_of_two_tenants_that_always_wait_differs_by_a_bounded_amount_for_ever() -> None:
    machine = Machine(num_seats=16)
    drifts = []
    for until_s in (60.0, 240.0):
        outcome = Simulation(machine, 60.0).run(flood(), until_s)
        assert outcome.service["b"] > 0 and outcome.num_refused == 0
        drifts.append(largest_drift(outcome.history, "flood", "b", from_s=10.0))
        assert drifts[-1] <= vtc_bound(16, 128, 128)
        assert largest_drift(outcome.history, "b", "c", from_s=10.0) <= vtc_bound(16, 128, 128)
    assert drifts[1] < 1.5 * drifts[0], "it does not grow with time"


def test_the_service_of_two_adapters_of_one_tenant_differs_by_a_bounded_amount() -> None:
    trace = [
        Arrival(0.0, "t", adapter, 64, 64, repeats=True) for adapter, num in (("a", 100), ("b", 20)) for _ in range(num)
    ]
    simulation = Simulation(Machine(num_seats=16), 60.0)
    gaps = []
    simulation.run(
        trace, 120.0, lambda simulation, plan: gaps.append(_service(simulation, "a") - _service(simulation, "b"))
    )
    assert len(gaps) > 1000
    assert max(gaps) - min(gaps) <= vtc_bound(16, 64, 64)


def _service(simulation: Simulation, adapter: str) -> float:
    return simulation.scheduler._clients._fairness.service("t", adapter)[1]


def test_tenants_get_shares_by_their_weights() -> None:
    outcome = Simulation(Machine(), 60.0).run(shares(), 120.0)
    one, two, four = (outcome.service[tenant] for tenant in ("one", "two", "four"))
    assert two / one == pytest.approx(2.0, rel=0.1)
    assert four / one == pytest.approx(4.0, rel=0.1)
    assert jain([one, two / 2, four / 4]) > 0.99


def adversary(seed: int, machine: Machine, max_composed: int = 1) -> list[Arrival]:
    """Many clients that do what hurts: hold slots and seats for ever, come in bursts, with any priority.

    max_composed: of their requests some are for so many adapters at once.
    """
    rng = random.Random(seed)
    adapters = [None, *(f"a{number}" for number in range(rng.choice([12, 60, 200])))]
    arrivals = [
        Arrival(0.0, "holds", f"hot{number % (2 * machine.num_slots)}", 30, 10_000, priority=-5, repeats=True)
        for number in range(rng.choice([machine.num_slots, machine.num_seats]))
    ]
    for _ in range(rng.choice([50, 250])):
        at_s = rng.choice([rng.random() * 60, 5.0, 30.0])
        tenant = rng.choice(["t", "u", "v", f"w{rng.randrange(40)}"])
        num_output = rng.choice([1, 20, 300, 10_000])
        drawn = [rng.choice(adapters)] if max_composed == 1 else rng.sample(adapters, rng.randint(1, max_composed))
        first, *others = [adapter for adapter in drawn if adapter is not None] or [None]
        arrivals.append(
            Arrival(
                at_s,
                tenant,
                first,
                rng.choice([5, 60, 200]),
                num_output,
                weight=rng.choice([0.1, 1.0, 10.0]),
                priority=rng.choice([-5, 0, 0, 9]),
                repeats=rng.random() < 0.3,
                others=tuple(other for other in others if other is not None),
            )
        )
    return arrivals


def adversarial(seed: int, max_composed: int) -> tuple[Machine, float]:
    """A machine and a bound. Loads within a fifth of a turn, prompts and recomputation within a turn."""
    rng = random.Random(seed)
    machine = Machine(
        num_slots=rng.choice([max(2, max_composed), 8]),
        num_seats=rng.choice([8, 32]),
        num_pages=1 << 12,
        max_num_batched_tokens=8192,
        step_s=0.04,
        token_s=5e-6,
        load_s=rng.choice([0.05, 0.15]),
    )
    return machine, rng.choice([10.0, 20.0])


@pytest.mark.parametrize("max_composed", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_no_client_waits_longer_than_the_bound_and_that_costs_at_most_a_fifth(seed: int, max_composed: int) -> None:
    machine, max_wait_s = adversarial(seed, max_composed)
    plain, bounded = (
        Simulation(machine, bound_s).run(adversary(seed, machine, max_composed), 60.0) for bound_s in (0.0, max_wait_s)
    )
    assert max(bounded.first_waits.values()) <= max_wait_s, "or it was refused"
    assert max(bounded.waits.values()) <= max_wait_s
    assert bounded.num_preemptions > 0
    assert bounded.num_given_up < 0.2 * bounded.num_accepted or max_composed > 1
    assert bounded.num_tokens >= 0.8 * plain.num_tokens


def test_nothing_is_amiss_at_any_step_of_a_trace() -> None:
    machine = Machine(num_slots=2, num_seats=8, num_pages=700)
    assert Simulation(machine, 10.0, check=True).run(adversary(3, machine), 30.0).num_preemptions > 0


def test_without_the_bound_the_same_clients_wait_as_long_as_outputs_of_ten_thousand_tokens_take() -> None:
    scenario = BY_NAME["all slots held"]
    assert max(run(scenario, 0.0).first_waits.values()) > 170.0
    assert max(run(scenario, 60.0).first_waits.values()) <= 60.0


def test_requests_are_refused_exactly_when_more_adapters_wait_than_the_bound_can_serve() -> None:
    machine = Machine()
    outcome = Simulation(machine, 60.0).run(overload(), 90.0)
    assert outcome.num_refused > 0 and not outcome.num_given_up
    for num_waiting, max_turns, was_refused in outcome.refusals:
        assert was_refused == (num_waiting >= max_turns)
    assert max(outcome.first_waits.values()) <= 60.0


@pytest.mark.parametrize("num_base", [0, 128])
@pytest.mark.parametrize(("num_slots", "num_each"), [(2, 32), (8, 1), (8, 8)])
def test_adapters_of_one_request_take_slots_from_busier_ones_within_a_fifth_of_the_throughput(
    num_slots: int, num_each: int, num_base: int
) -> None:
    load = Held(num_slots, num_each, 10_000, num_base)
    plain, bounded = (run_slow(load, max_wait_s, 60.0) for max_wait_s in (0.0, 20.0))
    assert bounded.num_tokens / bounded.seconds >= 0.8 * plain.num_tokens / plain.seconds
    assert max(bounded.waits.values()) <= 20.0
    assert any(adapter is not None and adapter.startswith("cold") for _, adapter in bounded.waits)
    assert bounded.num_preemptions > 0
    fair_rate = 4 / 6 * plain.num_tokens / plain.seconds
    assert base_rate(bounded) >= 0.8 * min(base_rate(plain), fair_rate)


def test_a_refused_client_that_tries_again_is_served_in_the_end() -> None:
    machine = Machine(num_slots=2, num_seats=8)
    trace = [Arrival(0.0, "t", f"a{number}", 10, 50, retries=True) for number in range(100)]
    outcome = Simulation(machine, 10.0).run(trace, 120.0)
    assert outcome.num_refused > 0
    assert {adapter for _, adapter in outcome.waits} == {f"a{number}" for number in range(100)}
    assert max(outcome.first_waits.values()) <= 10.0


def test_deciding_costs_little_while_thousands_wait_and_none_can_be_let_in() -> None:
    trace = [Arrival(0.0, "t", f"hot{number}", 10, 5000, repeats=True) for number in range(8)]
    trace += [Arrival(0.5, f"t{number % 7}", f"cold{number}", 10, 100) for number in range(4096)]
    outcome = Simulation(Machine(), 0.0).run(trace, 20.0)
    costs = sorted(outcome.schedule_s[100:])
    assert len(costs) > 500
    assert costs[len(costs) // 2] < 0.001


@pytest.mark.parametrize("num_base", [0, 128])
@pytest.mark.parametrize(
    ("read_s", "num_adapters", "num_tenants"),
    [(0.01, 60, 8), (0.1, 200, 1), (1.0, 60, 2), (10.0, 12, 1), (10.0, 100, 8)],
)
def test_the_bound_costs_at_most_a_fifth_of_the_throughput_however_slow_the_disk(
    read_s: float, num_adapters: int, num_tenants: int, num_base: int
) -> None:
    plain, bounded = (
        run_slow(Slow(read_s, num_adapters, num_tenants, num_base), max_wait_s, 45.0) for max_wait_s in (0.0, 20.0)
    )
    assert bounded.num_tokens / bounded.seconds >= 0.8 * plain.num_tokens / plain.seconds
    assert max(bounded.first_waits.values()) <= 20.0, "or the client was refused"
    assert bounded.num_finished > 0
    fair_rate = 4 / (4 + num_tenants) * plain.num_tokens / plain.seconds
    assert base_rate(bounded) >= 0.8 * min(base_rate(plain), fair_rate)


def test_adapters_whose_reads_hang_cost_the_others_nothing() -> None:
    names = [f"hung{number}" for number in range(40)]
    trace = [Arrival(0.0, "t", f"a{number % 8}", 20, 100, repeats=True) for number in range(32)]
    trace += [Arrival(0.0, "base", None, 20, 100, repeats=True) for _ in range(64)]
    hung = [Arrival(1.0, f"t{number % 8}", name, 20, 100, retries=True) for number, name in enumerate(names)]
    outcomes = [
        Simulation(Machine(read_s=0.1, hung=frozenset(names)), 15.0).run(own, 40.0) for own in (trace, trace + hung)
    ]
    assert outcomes[1].num_tokens >= 0.98 * outcomes[0].num_tokens
    assert outcomes[1].num_preemptions == outcomes[0].num_preemptions
    assert outcomes[1].num_given_up >= 40 and max(outcomes[1].waits.values()) <= 15.0


@pytest.mark.parametrize("scenario", SCENARIOS[:1], ids=lambda scenario: scenario.name)
def test_the_table_has_a_line_for_each_scenario(scenario: Scenario) -> None:
    outcome = Simulation(Machine(num_seats=4), 60.0).run(scenario.make(), 5.0)
    assert line(scenario, 60.0, outcome).startswith(scenario.name)


def test_jains_index_is_one_for_equals_and_one_nth_for_one_that_has_all() -> None:
    assert jain([5.0, 5.0, 5.0]) == pytest.approx(1.0)
    assert jain([9.0, 0.0, 0.0]) == pytest.approx(1 / 3)
