"""The adapters a worker lacks, the reasons, and the retries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from adapter_fleet import Clock, Controller, FakeClient

from lorafleet.controller.fleet import worker_adapters
from lorafleet.controller.fleet.worker_adapters import FIRST_RETRY_S, LAST_RETRY_S, MAX_LOADING, WorkerAdapters
from lorafleet.proto import worker_pb2


class Fleet:
    """A worker with sql, and one that joins later."""

    def __init__(self) -> None:
        self.clients = {"w0": FakeClient()}
        self.clock = Clock()
        self.controller = Controller(self.clients, self.clock)

    async def join(self, client: FakeClient) -> FakeClient:
        self.clients["w1"] = client
        await self.controller.step()
        return client

    async def step_after(self, seconds: float) -> None:
        self.clock.now += seconds
        await self.controller.step()


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    await fleet.controller.step()
    await fleet.controller.updates.load("sql", "/adapters/a", load_inplace=False)
    yield fleet
    await fleet.controller.kill()


@pytest.mark.parametrize(
    ("disk", "reason"),
    [({}, "missing_directory"), ({"/adapters/a": "other content"}, "changed")],
)
async def test_a_failed_load_is_reported_and_retried_with_growing_waits(
    disk: dict[str, str], reason: str, fleet: Fleet
) -> None:
    client = await fleet.join(FakeClient(disk=disk))
    assert fleet.controller.lacking("w1") == {"sql": reason}
    assert fleet.controller.lacking("w0") == {}
    num_tries = [len(client.requests)]
    for _ in range(10):
        await fleet.step_after(0.0)  # nothing is tried before its time
        await fleet.step_after(FIRST_RETRY_S)
        num_tries.append(len(client.requests))
    assert num_tries[0] == 1 and num_tries[-1] == 4, "at 1, 3 and 7 seconds"
    for _ in range(20):
        await fleet.step_after(LAST_RETRY_S)
    assert len(client.requests) >= 20
    assert sum("cannot have adapter sql" in line for line in fleet.controller.told) == 1
    client.disk = {"/adapters/a": "content a"}
    await fleet.step_after(LAST_RETRY_S)
    assert fleet.controller.lacking("w1") == {}
    assert client.serves() == {"sql": {"content a"}}


async def test_it_is_requested_by_place_and_digest_within_the_roots_of_its_load(fleet: Fleet) -> None:
    (adapter,) = fleet.controller.catalogue.adapters()
    client = await fleet.join(FakeClient())
    (request,) = client.requests
    assert (request.place, request.digest) == ("/adapters/a", "content a")
    assert list(request.allowed_roots) == ["/adapters"]
    assert request.version == adapter.version


async def test_an_unloaded_adapter_is_not_retried(fleet: Fleet) -> None:
    client = await fleet.join(FakeClient(disk={}))
    task = asyncio.ensure_future(fleet.controller.updates.unload("sql"))
    while fleet.controller.names():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0)
    num_tries = len(client.requests)
    await fleet.controller.settle()
    assert len(client.requests) == num_tries and fleet.controller.lacking("w1") == {}
    await task


async def test_adapters_are_loaded_in_parallel_within_a_bound_and_a_hung_one_holds_up_none(fleet: Fleet) -> None:
    catalogue = fleet.controller.catalogue
    for number in range(30):
        letter = "c" if number == 0 else "b"
        catalogue.put_adapter(
            worker_pb2.Adapter(
                name=f"a{number}",
                version=catalogue.next_version(),
                place=f"/adapters/{letter}",
                digest=f"content {letter}",
            )
        )

    class Hanging(FakeClient):
        reading = most = 0

        async def register(self, adapter: worker_pb2.Adapter) -> worker_pb2.Adapter:
            self.reading += 1
            self.most = max(self.most, self.reading)
            await (hung.wait() if adapter.name == "a0" else asyncio.sleep(0))
            found = await super().register(adapter)
            self.reading -= 1
            return found

    hung = asyncio.Event()
    client = Hanging()
    worker = WorkerAdapters("w1", client, fleet.controller.fleet, clock=fleet.clock)  # type: ignore[arg-type]
    following = asyncio.create_task(worker.follow())
    async with asyncio.timeout(10.0):
        while len(client.known) < 30:  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)
    assert client.most == MAX_LOADING
    assert [lacking.name for lacking in worker.lacking()] == ["a0"] and not worker.settled.is_set()
    hung.set()
    async with asyncio.timeout(10.0):
        await worker.settled.wait()
    assert worker.lacking() == []
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def test_thousands_of_loads_do_not_publish_a_table_each(fleet: Fleet) -> None:
    catalogue = fleet.controller.catalogue
    for number in range(2000):
        catalogue.put_adapter(
            worker_pb2.Adapter(
                name=f"a{number}", version=catalogue.next_version(), place="/adapters/b", digest="content b"
            )
        )
    before = len(fleet.controller.published)
    client = await fleet.join(FakeClient())
    assert len(client.known) == 2001
    assert len(fleet.controller.published) - before < 50


async def test_the_effect_of_a_failed_call_is_found(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next look finds what it may have left."""
    client = fleet.clients["w0"]
    stray = worker_pb2.Adapter(name="stray", version=7, digest="content c")
    client.known["stray", 7] = stray
    await fleet.step_after(worker_adapters.LOOK_S)
    assert ("stray", 7) not in client.known, "no worker has noted it, and all were heard"
    client.known["stray", 8] = stray
    fleet.clients["w1"] = FakeClient(reachable=False)
    await fleet.step_after(worker_adapters.LOOK_S)
    assert ("stray", 8) in client.known, "the silent one may know of it"


@pytest.mark.parametrize("num_turns", range(5))
async def test_following_ends_when_it_is_cancelled_as_something_wakes_it(num_turns: int) -> None:
    """A lost worker fails a load, which wakes `follow`, and leaves the table, which cancels it, at the same time."""
    controller = Controller({}, Clock())
    adapters = WorkerAdapters("w0", cast(Any, FakeClient()), controller.fleet, clock=controller.clock)
    following = asyncio.create_task(adapters.follow())
    await asyncio.wait_for(adapters.settled.wait(), 5)
    for _ in range(10):
        await asyncio.sleep(0)  # until it waits to be woken
    adapters.wake()
    for _ in range(num_turns):
        await asyncio.sleep(0)
    following.cancel()
    _, pending = await asyncio.wait([following], timeout=5)
    assert not pending
