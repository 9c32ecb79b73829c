"""Virtual token counters: their guarantee for two flows that always wait; idleness earns nothing."""

from __future__ import annotations

import random

import pytest

from lorafleet.workers.scheduling.fairness import MAX_IDLE, Counters, Fairness


def serve(counters: Counters[str], flows: list[str], service: float = 1.0) -> str:
    """Give the flow with the least counter one unit of service."""
    flow = min(flows, key=lambda name: (counters[name], name))
    counters.charge(flow, service)
    return flow


def test_flows_that_always_wait_get_the_same() -> None:
    counters: Counters[str] = Counters()
    for name in "abc":
        counters.update(name, waits=True, runs=False)
    served = [serve(counters, ["a", "b", "c"]) for _ in range(300)]
    assert [served.count(name) for name in "abc"] == [100, 100, 100]


def test_idleness_earns_no_credit() -> None:
    counters: Counters[str] = Counters()
    counters.update("busy", waits=True, runs=True)
    counters.charge("busy", 1000.0)
    counters.update("late", waits=True, runs=False)
    served = [serve(counters, ["busy", "late"]) for _ in range(100)]
    assert served.count("late") == 50


def test_a_debt_outlives_a_short_absence() -> None:
    counters: Counters[str] = Counters()
    for name in ("a", "b"):
        counters.update(name, waits=True, runs=True)
    counters.charge("a", 100.0)
    counters.update("a", waits=False, runs=False)
    counters.update("a", waits=True, runs=False)
    assert counters["a"] - counters["b"] == 100.0


def test_who_waits_while_nobody_else_does_is_lifted_to_those_that_run() -> None:
    counters: Counters[str] = Counters()
    counters.update("runs", waits=False, runs=True)
    counters.charge("runs", 500.0)
    counters.update("comes", waits=True, runs=False)
    assert counters["comes"] == 500.0


def test_the_level_outlives_everybody() -> None:
    counters: Counters[str] = Counters()
    counters.update("a", waits=True, runs=False)
    counters.update("a", waits=False, runs=True)
    counters.charge("a", 70.0)
    counters.update("a", waits=False, runs=False)
    assert not counters._values, "and nothing else does"
    counters.update("b", waits=True, runs=False)
    assert counters["b"] == 70.0


@pytest.mark.parametrize("seed", range(5))
def test_idle_flows_are_forgotten_without_a_difference(seed: int) -> None:
    rng = random.Random(seed)
    forgetful: Counters[int] = Counters()
    elephant: Counters[int] = Counters()
    elephant._idle.first = lambda: None  # type: ignore[method-assign]  # never forgets
    states: dict[int, tuple[bool, bool]] = {}
    for _ in range(3000):
        flow = rng.randrange(40)
        active = [name for name, state in states.items() if any(state)]
        if active and rng.random() < 0.5:
            flow = rng.choice(active)
            service = rng.random() * 10
            forgetful.charge(flow, service)
            elephant.charge(flow, service)
        else:
            waits, runs = states[flow] = (rng.random() < 0.3, rng.random() < 0.3)
            forgetful.update(flow, waits=waits, runs=runs)
            elephant.update(flow, waits=waits, runs=runs)
        forgetful.check_integrity()
        for name, state in states.items():
            if any(state):
                assert forgetful[name] == elephant[name]
    assert len(forgetful._values) <= len(elephant._values) == len(states)


def test_memory_is_bounded_while_the_level_stands_still() -> None:
    counters: Counters[int] = Counters()
    counters.update(-1, waits=True, runs=False)  # is never served, so the level is 0
    for flow in range(5 * MAX_IDLE):
        counters.update(flow, waits=True, runs=False)
        counters.update(flow, waits=False, runs=True)
        counters.charge(flow, 1.0 + flow)
        counters.update(flow, waits=False, runs=False)
    assert len(counters._values) == MAX_IDLE + 1
    counters.check_integrity()
    counters.update(5 * MAX_IDLE - 1, waits=True, runs=False)
    assert counters[5 * MAX_IDLE - 1] == 5.0 * MAX_IDLE, "the largest debts are kept"


def test_tenants_come_before_their_adapters_and_weights_divide() -> None:
    fairness = Fairness()
    for tenant, adapter in (("a", "x"), ("a", None), ("b", "x")):
        fairness.update(tenant, adapter, waits=True, runs=False)
    fairness.charge("a", "x", 12.0, tenant_weight=3.0, adapter_weight=2.0)
    assert fairness.service("a", "x") == (4.0, 6.0)
    assert fairness.service("a", None) == (4.0, 0.0)
    assert fairness.service("b", "x") == (0.0, 0.0), "another tenant's use of an adapter is not b's"
    fairness.check_integrity()


def test_a_tenant_without_requests_leaves_only_its_own_counter() -> None:
    fairness = Fairness()
    fairness.update("stays", None, waits=True, runs=False)
    for adapter in range(50):
        fairness.update("goes", f"{adapter}", waits=True, runs=True)
        fairness.charge("goes", f"{adapter}", 5.0, tenant_weight=1.0, adapter_weight=1.0)
    for adapter in range(50):
        fairness.update("goes", f"{adapter}", waits=False, runs=False)
    assert fairness._adapters.keys() == {"stays"}
    fairness.update("goes", "0", waits=True, runs=False)
    assert fairness.service("goes", "0") == (250.0, 0.0)
