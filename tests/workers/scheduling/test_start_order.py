"""The request that starts next, compared with a search of all waiting requests each time."""

from __future__ import annotations

import random

import pytest

from lorafleet.workers.scheduling.flows import Flow, Flows
from lorafleet.workers.scheduling.request import GenerateRequest, Request
from lorafleet.workers.scheduling.sampling_options import SamplingOptions
from lorafleet.workers.scheduling.start_order import StartOrder
from lorafleet.workers.scheduling.turns import WaitBound


def start(flows: Flows, flow: Flow) -> str:
    request = flow.waiting[0]
    flows.start(request)
    flows.charge_prompt(request, 0)
    return request.request_id


def likeliest(flows: Flows, adapters: list[str | None], without: set[str]) -> Flow | None:
    firsts = [flows.first_beside(without, adapter) for adapter in adapters]
    return min((flow for flow in firsts if flow is not None), key=flows.rank, default=None)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("without", [set(), {"t0"}])
def test_it_is_the_order_of_service(seed: int, without: set[str]) -> None:
    drawn = random.Random(seed)
    flows = Flows(WaitBound(0.0, 4, 8))
    adapters: list[str | None] = [None, *(f"a{number}" for number in range(drawn.choice([1, 3, 30])))]
    num_tenants = drawn.choice([1, 2, 5])
    for arrival in range(80):
        generate = GenerateRequest(
            f"{arrival}",
            (7,) * drawn.randint(1, 40),
            SamplingOptions(max_tokens=1),
            drawn.choice(adapters),
            tenant=f"t{drawn.randrange(num_tenants)}",
            priority=drawn.choice([0, 0, 0, 1]),
        )
        flows.add(Request.from_generate(generate, arrival), now=0.0)
    order = StartOrder(flows, adapters, without)
    while (flow := order.first()) is not None:
        assert flow is likeliest(flows, adapters, without)
        start(flows, flow)
        order.started(flow)
    assert likeliest(flows, adapters, without) is None


def test_a_start_looks_at_few_of_a_tenants_many_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    flows = Flows(WaitBound(0.0, 4, 8))
    adapters = [f"a{number}" for number in range(500)]
    for arrival, adapter in enumerate(adapters):
        generate = GenerateRequest(adapter, (7,), SamplingOptions(max_tokens=1), adapter, tenant="one")
        flows.add(Request.from_generate(generate, arrival), now=0.0)
    order = StartOrder(flows, adapters)
    num_ranked = 0
    rank_of = flows.rank_of

    def count(request: Request) -> object:
        nonlocal num_ranked
        num_ranked += 1
        return rank_of(request)

    monkeypatch.setattr(flows, "rank_of", count)
    for _ in range(50):
        flow = order.first()
        assert flow is not None
        start(flows, flow)
        order.started(flow)
    assert num_ranked < 50 * 25, "not each time all of them"
