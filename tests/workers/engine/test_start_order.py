"""Which request starts next, compared with looking at all that wait each time."""

from __future__ import annotations

import random

import pytest

from lorafleet.workers.engine.clients import Client, Clients
from lorafleet.workers.engine.request import GenerateRequest, Request, SamplingOptions
from lorafleet.workers.engine.start_order import StartOrder
from lorafleet.workers.engine.turns import WaitBound


def start(clients: Clients, client: Client) -> str:
    request = client.waiting[0]
    clients.start(request)
    clients.charge_prompt(request, 0)
    return request.request_id


def likeliest(clients: Clients, adapters: list[str | None], without: set[str]) -> Client | None:
    firsts = [clients.first_beside(without, adapter) for adapter in adapters]
    return min((client for client in firsts if client is not None), key=clients.rank, default=None)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("without", [set(), {"t0"}])
def test_it_is_the_order_of_service(seed: int, without: set[str]) -> None:
    drawn = random.Random(seed)
    clients = Clients(WaitBound(0.0, 4, 8))
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
        clients.add(Request.from_generate(generate, arrival), now=0.0)
    order = StartOrder(clients, adapters, without)
    while (client := order.first()) is not None:
        assert client is likeliest(clients, adapters, without)
        start(clients, client)
        order.started(client)
    assert likeliest(clients, adapters, without) is None


def test_a_start_looks_at_few_of_a_tenants_many_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = Clients(WaitBound(0.0, 4, 8))
    adapters = [f"a{number}" for number in range(500)]
    for arrival, adapter in enumerate(adapters):
        generate = GenerateRequest(adapter, (7,), SamplingOptions(max_tokens=1), adapter, tenant="one")
        clients.add(Request.from_generate(generate, arrival), now=0.0)
    order = StartOrder(clients, adapters)
    num_ranked = 0
    rank_of = clients.rank_of

    def count(request: Request) -> object:
        nonlocal num_ranked
        num_ranked += 1
        return rank_of(request)

    monkeypatch.setattr(clients, "rank_of", count)
    for _ in range(50):
        client = order.first()
        assert client is not None
        start(clients, client)
        order.started(client)
    assert num_ranked < 50 * 25, "not each time all of them"
