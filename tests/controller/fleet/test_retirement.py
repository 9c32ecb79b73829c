"""Old versions stay everywhere for as long as requests anywhere may need them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from adapter_fleet import RESUME_S, Clock, Controller, FakeClient

from lorafleet.controller.fleet import retirement as retirement_module
from lorafleet.controller.fleet.retirement import GRACE_S, NOTICE_S


class Fleet:
    """Two workers; sql was content a, and is content b now."""

    def __init__(self) -> None:
        self.clients = {"w0": FakeClient(), "w1": FakeClient()}
        self.clock = Clock()
        self.controller = Controller(self.clients, self.clock)

    async def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        await self.controller.step()
        await self.controller.retirement.step()
        await asyncio.sleep(0)
        await asyncio.gather(*self.controller.retirement._dropping)

    def have_both(self) -> list[bool]:
        return [client.serves()["sql"] == {"content a", "content b"} for client in self.clients.values()]


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    await fleet.controller.step()
    await fleet.controller.updates.load("sql", "/adapters/a", load_inplace=False)
    await fleet.controller.updates.load("sql", "/adapters/b", load_inplace=True)
    yield fleet
    await fleet.controller.kill()


async def test_a_replaced_version_is_freed_after_requests_just_resolved_to_it(fleet: Fleet) -> None:
    await fleet.pass_time(GRACE_S / 2)
    assert fleet.have_both() == [True, True]
    await fleet.pass_time(GRACE_S / 2)
    assert fleet.have_both() == [False, False]


async def test_a_worker_keeps_an_old_version_that_only_another_ones_requests_need(fleet: Fleet) -> None:
    fleet.clients["w0"].in_use = {"content a"}
    for _ in range(3):
        await fleet.pass_time(1000.0)
        assert fleet.have_both() == [True, True]
    fleet.clients["w0"].in_use = set()
    await fleet.pass_time(0.0)
    assert fleet.have_both() == [False, False]


async def test_when_the_worker_of_such_a_request_dies_the_other_one_still_has_its_version(fleet: Fleet) -> None:
    fleet.clients["w0"].in_use = {"content a"}
    await fleet.pass_time(GRACE_S)
    fleet.controller.lose("w0")
    fleet.clients["w0"] = FakeClient()
    await fleet.pass_time(NOTICE_S)
    assert fleet.have_both() == [True, True], "the new process has it too, should the request come there"
    fleet.clients["w1"].in_use = {"content a"}
    await fleet.pass_time(RESUME_S)
    assert fleet.have_both() == [True, True]
    fleet.clients["w1"].in_use = set()
    await fleet.pass_time(0.0)
    assert fleet.have_both() == [False, False]


async def test_nothing_is_freed_while_a_lost_workers_requests_may_be_moving(fleet: Fleet) -> None:
    fleet.controller.lose("w0")
    await fleet.pass_time(RESUME_S)
    assert fleet.have_both()[1]
    await fleet.pass_time(NOTICE_S)
    assert not fleet.have_both()[1]


async def test_a_worker_that_does_not_answer_may_need_it(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(digests: object, cut_s: float) -> set[str]:
        client.reachable = False
        await client._arrive()
        return set()

    client = fleet.clients["w0"]
    with monkeypatch.context() as patch:
        patch.setattr(client, "used", silent)
        await fleet.pass_time(1000.0)
    client.reachable = True
    assert fleet.have_both() == [True, True]
    await fleet.pass_time(0.0)
    assert fleet.have_both() == [False, False]


async def test_what_another_name_stands_for_is_not_waited_for(fleet: Fleet) -> None:
    """Requests for it never end, and nothing is freed."""
    for client in fleet.clients.values():
        client.in_use = {"content a"}
    await fleet.controller.updates.load("other", "/adapters/a", load_inplace=False)
    await fleet.pass_time(GRACE_S)
    assert fleet.have_both() == [False, False]


async def test_a_restarted_controller_holds_what_it_finds(fleet: Fleet) -> None:
    await fleet.controller.kill()
    fleet.controller = Controller(fleet.clients, fleet.clock, is_restart=True)
    await fleet.pass_time(0.0)
    await fleet.pass_time(RESUME_S)
    assert fleet.have_both() == [True, True]
    await fleet.pass_time(NOTICE_S)
    assert fleet.have_both() == [False, False]


async def test_an_unload_that_cannot_free_yet_returns_how_many_workers_drain(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retirement_module, "FREE_S", 0.0)
    monkeypatch.setattr(retirement_module, "GRACE_S", 0.2)
    fleet.clients["w0"].in_use = {"content b"}
    unloading = asyncio.ensure_future(fleet.controller.updates.unload("sql"))
    await asyncio.sleep(0)
    while not unloading.done():
        await fleet.pass_time(1.0)
        await asyncio.sleep(0.002)
    assert (await unloading).num_draining == 1
    fleet.clients["w0"].in_use = set()
    await fleet.pass_time(1.0)
    assert not any(client.known for client in fleet.clients.values())


async def test_it_runs_by_itself(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retirement_module, "POLL_S", 0.0)
    fleet.clock.now += GRACE_S
    running = asyncio.create_task(fleet.controller.retirement.run())
    async with asyncio.timeout(10.0):
        while any(fleet.have_both()):  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
