"""Loading and unloading on all workers or none, with workers whose disks are dictionaries."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from adapter_fleet import ROOTS, CallFailed, Clock, Controller, FakeClient

from lorafleet.controller.fleet import adapters as adapters_module
from lorafleet.controller.fleet import retirement as retirement_module
from lorafleet.controller.fleet import update_turns
from lorafleet.controller.fleet.retirement import Freed
from lorafleet.proto import worker_pb2
from lorafleet.workers.errors import (
    AdapterConflictError,
    AdapterRefusedError,
    InvalidRequestError,
    LoRAFleetError,
    NotFoundError,
    UnknownModelError,
    WorkerUnavailableError,
)


class Fleet:
    """Two workers and their controller."""

    def __init__(self, *, allowed: bool = True) -> None:
        self.clients = {"w0": FakeClient(), "w1": FakeClient()}
        self.clock = Clock()
        self.controller = Controller(self.clients, self.clock, allowed=allowed)

    @property
    def workers(self) -> list[FakeClient]:
        return list(self.clients.values())

    def names(self) -> dict[str, str]:
        return self.controller.names()

    async def load(self, name: str, root: str, *, load_inplace: bool = False) -> worker_pb2.Adapter:
        return await self.controller.updates.load(name, root, load_inplace=load_inplace)

    async def restart_controller(self) -> None:
        await self.controller.kill()
        self.controller = Controller(self.clients, self.clock, is_restart=True)


@pytest.fixture
async def fleet(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    monkeypatch.setattr(retirement_module, "GRACE_S", 0.0)
    fleet = Fleet()
    await fleet.controller.step()
    yield fleet
    await fleet.controller.kill()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)


async def refused(fleet: Fleet, name: str, root: str, kind: type[LoRAFleetError], match: str) -> LoRAFleetError:
    """Return the error of a load that must fail and change nothing."""
    names, known = fleet.names(), [dict(worker.known) for worker in fleet.workers]
    with pytest.raises(kind, match=match) as caught:
        await fleet.load(name, root)
    assert fleet.names() == names
    assert [worker.known for worker in fleet.workers] == known
    return caught.value


async def unload(fleet: Fleet, name: str) -> tuple[int, int, int]:
    """Unload. Return device bytes, host bytes, number of draining workers."""
    return await freed(fleet, asyncio.ensure_future(fleet.controller.updates.unload(name)))


async def freed(fleet: Fleet, unloading: asyncio.Future[Freed]) -> tuple[int, int, int]:
    async with asyncio.timeout(10.0):
        while not unloading.done():
            await fleet.controller.retirement.step()
            await asyncio.sleep(0)
    got = await unloading
    return got.device_bytes, got.host_bytes, got.num_draining


async def test_an_adapter_is_on_every_worker_and_noted_before_its_name_is_published(fleet: Fleet) -> None:
    first, second = fleet.workers
    fleet.controller.published.clear()
    second.gate.clear()
    loading = asyncio.ensure_future(fleet.load("sql", "/adapters/a"))
    await until(lambda: first.known)
    assert not fleet.controller.published and not first.names.all()
    second.gate.set()
    adapter = await loading
    assert (adapter.name, adapter.digest, adapter.place) == ("sql", "content a", "/adapters/a")
    assert fleet.controller.published == [{"sql": "content a"}]
    for worker in fleet.workers:
        assert worker.known.keys() == {("sql", adapter.version)}
        assert worker.names.all() == [adapter]
        assert [tuple(request.allowed_roots) for request in worker.requests] == [ROOTS]


async def test_an_adapter_that_one_worker_refuses_is_on_none(fleet: Fleet) -> None:
    del fleet.workers[1].disk["/adapters/a"]
    error = await refused(fleet, "sql", "/adapters/a", AdapterRefusedError, "is not there")
    assert isinstance(error, AdapterRefusedError) and error.reason == "missing_directory"


async def test_a_refusal_by_several_workers_is_answered_once_and_leaves_no_warning(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    for worker in fleet.workers:
        worker.disk.clear()
    await refused(fleet, "sql", "/adapters/a", AdapterRefusedError, "is not there")
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_a_refusal_is_answered_while_another_worker_still_reads(fleet: Fleet) -> None:
    fleet.workers[0].gate.clear()
    del fleet.workers[1].disk["/adapters/a"]
    await refused(fleet, "sql", "/adapters/a", AdapterRefusedError, "is not there")


async def test_an_adapter_that_differs_between_workers_is_refused(fleet: Fleet) -> None:
    fleet.workers[1].disk["/adapters/a"] = "other content"
    await refused(fleet, "sql", "/adapters/a", AdapterRefusedError, "not the same on all workers")


async def test_a_worker_lost_during_a_load_gets_the_adapter_when_it_is_back(fleet: Fleet) -> None:
    fleet.workers[1].reachable = False
    adapter = await fleet.load("sql", "/adapters/a")
    assert fleet.controller.lacking("w1") == {"sql": ""}, "no request goes there for it"
    fleet.workers[1].reachable = True
    await fleet.controller.step()
    assert fleet.workers[1].known.keys() == {("sql", adapter.version)}
    assert fleet.controller.lacking("w1") == {}


async def test_a_worker_that_leaves_the_table_while_it_reads_is_not_waited_for(fleet: Fleet) -> None:
    fleet.workers[1].gate.clear()
    loading = asyncio.ensure_future(fleet.load("sql", "/adapters/a"))
    await until(lambda: fleet.workers[0].known)
    fleet.controller.lose("w1")
    assert (await loading).digest == "content a"


async def test_a_load_during_which_all_workers_are_lost_changes_nothing(fleet: Fleet) -> None:
    for worker in fleet.workers:
        worker.reachable = False
    await refused(fleet, "sql", "/adapters/a", WorkerUnavailableError, "Nothing changed")


async def test_without_workers_nothing_can_be_loaded_or_unloaded(fleet: Fleet) -> None:
    await fleet.load("sql", "/adapters/a")
    for name in fleet.clients:
        fleet.controller.lose(name)
    await refused(fleet, "other", "/adapters/a", WorkerUnavailableError, "No worker")
    with pytest.raises(WorkerUnavailableError, match="No worker"):
        await fleet.controller.updates.unload("sql")
    assert fleet.names() == {"sql": "content a"}


@pytest.mark.parametrize(
    ("name", "root", "kind", "match"),
    [
        ("base", "/adapters/a", AdapterConflictError, "base model"),
        ("", "/adapters/a", InvalidRequestError, "must be given"),
        ("sql", "", InvalidRequestError, "must be given"),
        ("x" * 257, "/adapters/a", InvalidRequestError, "256"),
        ("a\nb", "/adapters/a", InvalidRequestError, "printable"),
        ("sql", "/" + "x" * 4096, InvalidRequestError, "4096"),
        ("sql", "/adapters/\0", InvalidRequestError, "printable"),
        ("sql", "/adapters/a\n2026-11-30 ERROR", InvalidRequestError, "printable"),
        ("sql", "/adapters/\x1b[2J", InvalidRequestError, "printable"),
        ("x" * 5_000_000, "x" * 5_000_000, InvalidRequestError, "printable"),
    ],
)
async def test_name_and_path_are_required(
    name: str, root: str, kind: type[LoRAFleetError], match: str, fleet: Fleet
) -> None:
    error = await refused(fleet, name, root, kind, match)
    assert len(error.message) < 500
    assert not any(worker.requests for worker in fleet.workers)


async def test_a_name_in_use_is_replaced_only_in_place_and_the_old_version_is_freed(fleet: Fleet) -> None:
    first = await fleet.load("sql", "/adapters/a")
    await refused(fleet, "sql", "/adapters/b", AdapterConflictError, "already been loaded")
    second = await fleet.load("sql", "/adapters/b", load_inplace=True)
    assert second.version > first.version and fleet.names() == {"sql": "content b"}
    await fleet.controller.retirement.step()
    await until(lambda: all(worker.known.keys() == {("sql", second.version)} for worker in fleet.workers))


async def test_weight_and_pin_go_to_the_workers_and_into_the_table(fleet: Fleet) -> None:
    await fleet.controller.updates.load("sql", "/adapters/a", load_inplace=False, weight=2.5, pin=True)
    (adapter,) = fleet.controller.catalogue.table().adapters
    assert (adapter.weight, adapter.pin) == (2.5, True)
    fleet.clients["w2"] = FakeClient()
    await fleet.controller.step()
    (again,) = fleet.clients["w2"].known.values()
    assert (again.weight, again.pin) == (2.5, True)
    for weight in (0.0, -1.0, 1e4, float("nan")):
        with pytest.raises(InvalidRequestError, match="weight is"):
            await fleet.controller.updates.load("other", "/adapters/b", load_inplace=False, weight=weight)


async def test_a_failed_replacement_leaves_the_old_version_serving(fleet: Fleet) -> None:
    first = await fleet.load("sql", "/adapters/a")
    with pytest.raises(AdapterRefusedError):
        await fleet.load("sql", "/adapters/nowhere", load_inplace=True)
    assert fleet.names() == {"sql": "content a"}
    assert all(worker.known.keys() == {("sql", first.version)} for worker in fleet.workers)


async def test_loads_of_one_name_come_one_after_the_other(fleet: Fleet) -> None:
    roots = [f"/adapters/{'abc'[number % 3]}" for number in range(5)]
    results = await asyncio.gather(*(fleet.load("sql", root) for root in roots), return_exceptions=True)
    (adapter,) = [result for result in results if isinstance(result, worker_pb2.Adapter)]
    assert sum(isinstance(result, AdapterConflictError) for result in results) == 4
    assert fleet.names() == {"sql": adapter.digest}


async def test_a_storm_of_replacements_ends_with_the_last_and_leaves_nothing_else(fleet: Fleet) -> None:
    roots = [f"/adapters/{'abc'[number % 3]}" for number in range(50)]
    loaded = await asyncio.gather(*(fleet.load("sql", root, load_inplace=True) for root in roots))
    assert len({adapter.version for adapter in loaded}) == 50
    newest = max(loaded, key=lambda adapter: adapter.version)
    assert fleet.names() == {"sql": newest.digest}
    await fleet.controller.settle()
    assert all(worker.known.keys() == {("sql", newest.version)} for worker in fleet.workers)


async def test_a_load_that_hangs_holds_up_no_other_name(fleet: Fleet) -> None:
    worker = fleet.workers[0]
    worker.gate.clear()
    hanging = asyncio.ensure_future(fleet.load("slow", "/adapters/a"))
    await until(lambda: worker.requests)
    worker.gate = asyncio.Event()
    worker.gate.set()
    assert (await fleet.load("other", "/adapters/b")).digest == "content b"
    assert await unload(fleet, "other") == (20, 6, 0)
    assert not hanging.done()
    hanging.cancel()


async def test_an_unload_waits_for_the_load_of_its_name(fleet: Fleet) -> None:
    fleet.workers[0].gate.clear()
    loading = asyncio.ensure_future(fleet.load("sql", "/adapters/a"))
    await until(lambda: fleet.workers[0].requests)
    unloading = asyncio.ensure_future(fleet.controller.updates.unload("sql"))
    await asyncio.sleep(0)
    fleet.workers[0].gate.set()
    await loading
    assert await freed(fleet, unloading) == (20, 6, 0)
    assert fleet.names() == {}


async def test_an_update_without_a_turn_in_time_is_a_conflict(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_turns, "TURN_S", 0.01)
    fleet.workers[0].gate.clear()
    loading = asyncio.ensure_future(fleet.load("sql", "/adapters/a"))
    await until(lambda: fleet.workers[0].requests)
    with pytest.raises(AdapterConflictError, match="still under way"):
        await fleet.controller.updates.unload("sql")
    loading.cancel()


async def test_a_caller_who_disconnects_leaves_nothing_half_done(fleet: Fleet) -> None:
    fleet.workers[0].gate.clear()
    loading = asyncio.ensure_future(fleet.load("sql", "/adapters/a"))
    await until(lambda: fleet.workers[1].known)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    fleet.workers[0].gate.set()
    await until(lambda: fleet.names() == {"sql": "content a"})


async def test_unloading_removes_the_name_first_and_returns_what_it_freed(fleet: Fleet) -> None:
    await fleet.load("sql", "/adapters/a")
    assert await unload(fleet, "sql") == (20, 6, 0)
    assert fleet.controller.published[-1] == {}
    assert not any(worker.known for worker in fleet.workers)
    with pytest.raises(UnknownModelError, match="'sql'"):
        await fleet.controller.updates.unload("sql")
    with pytest.raises(UnknownModelError) as caught:
        await fleet.controller.updates.unload("x" * 5_000_000)
    assert len(caught.value.message) < 500


async def test_unloading_says_which_workers_still_drain_and_forgets_those_that_are_lost(fleet: Fleet) -> None:
    await fleet.load("sql", "/adapters/a")
    fleet.workers[0].draining = True
    fleet.controller.lose("w1")
    fleet.clock.now += 1000
    assert await unload(fleet, "sql") == (0, 0, 1)


async def test_without_permission_nothing_can_be_changed() -> None:
    fleet = Fleet(allowed=False)
    with pytest.raises(NotFoundError, match="--allow-runtime-lora-updates"):
        await fleet.load("sql", "/adapters/a")
    with pytest.raises(NotFoundError, match="--allow-runtime-lora-updates"):
        await fleet.controller.updates.unload("sql")


async def test_a_restarted_controller_deletes_nothing_because_the_first_worker_does_not_know_it(fleet: Fleet) -> None:
    await fleet.load("sql", "/adapters/a")
    await fleet.load("legal", "/adapters/b")
    first, second = fleet.workers
    first.known.clear()  # it was restarted, and its node has lost a file
    first.names = type(first.names)()
    del first.disk["/adapters/b"]
    await fleet.restart_controller()
    await fleet.controller.settle()
    assert fleet.names() == {"sql": "content a", "legal": "content b"}
    assert fleet.controller.lacking("w0") == {"legal": "missing_directory"}
    assert fleet.controller.lacking("w1") == {}
    assert second.serves() == {"sql": {"content a"}, "legal": {"content b"}}


async def test_the_newest_version_counts_whichever_worker_is_heard_first(fleet: Fleet) -> None:
    start = worker_pb2.Adapter(name="sql", version=1, root="/adapters/a", place="/adapters/a", digest="content a")
    await fleet.load("sql", "/adapters/b")
    for number in range(2):
        restarted = FakeClient(known={("sql", 1): start})
        restarted.names.note([start])
        fleet.clients[f"w{number}"] = restarted  # with what its start-up says
        await fleet.restart_controller()
        await fleet.controller.settle()
        assert fleet.names() == {"sql": "content b"}
        assert all(worker.serves() == {"sql": {"content b"}} for worker in fleet.workers)


async def test_an_acknowledged_unload_lasts_when_all_but_one_worker_are_lost(fleet: Fleet) -> None:
    start = worker_pb2.Adapter(name="sql", version=1, root="/adapters/a", place="/adapters/a", digest="content a")
    for worker in fleet.workers:
        worker.known["sql", 1] = start
        worker.names.note([start])
    await fleet.restart_controller()
    await fleet.controller.settle()
    assert fleet.names() == {"sql": "content a"}
    await unload(fleet, "sql")
    restarted = FakeClient(known={("sql", 1): start})
    restarted.names.note([start])
    fleet.clients["w0"] = restarted
    await fleet.restart_controller()
    await fleet.controller.settle()
    assert fleet.names() == {} and not any(worker.known for worker in fleet.workers)


async def test_a_load_whose_answer_was_lost_leaves_no_content_for_the_next(fleet: Fleet) -> None:
    for worker in fleet.workers:
        worker.lose_answers = {"register", "unregister"}
    with pytest.raises(WorkerUnavailableError):
        await fleet.load("sql", "/adapters/a")
    for worker in fleet.workers:
        worker.disk["/adapters/a"] = "mended"
    adapter = await fleet.load("sql", "/adapters/a")
    assert adapter.digest == "mended"
    await fleet.controller.settle()
    assert all(worker.known.keys() == {("sql", adapter.version)} for worker in fleet.workers)


async def test_reconciling_keeps_what_a_load_has_staged(fleet: Fleet) -> None:
    fleet.workers[1].gate.clear()
    loading = asyncio.ensure_future(fleet.load("new", "/adapters/a"))
    await until(lambda: fleet.workers[0].known)
    fleet.clock.now += 61.0
    await fleet.controller.workers["w0"].step()
    fleet.workers[1].gate.set()
    adapter = await loading
    assert all(worker.known.keys() == {("new", adapter.version)} for worker in fleet.workers)


async def test_a_load_that_no_worker_has_noted_is_not_acknowledged(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(adapters: object) -> None:
        raise CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED)

    for worker in fleet.workers:
        monkeypatch.setattr(worker, "note", fail)
    with pytest.raises(WorkerUnavailableError, match="GET /v1/models"):
        await fleet.load("sql", "/adapters/a")


async def test_a_clock_set_back_assigns_no_version_twice(fleet: Fleet) -> None:
    first = await fleet.load("sql", "/adapters/a")
    fleet.clock.now -= 600.0
    await fleet.restart_controller()
    await fleet.controller.step()
    second = await fleet.load("sql", "/adapters/b", load_inplace=True)
    assert second.version > first.version and fleet.names() == {"sql": "content b"}


async def test_places_that_differ_between_nodes_are_found_by_each_in_its_own_way(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = fleet.workers[1]
    register = worker.register

    async def elsewhere(adapter: worker_pb2.Adapter) -> worker_pb2.Adapter:
        found = await register(adapter)
        found.place = "/mnt/other/a"
        return found

    monkeypatch.setattr(worker, "register", elsewhere)
    assert (await fleet.load("sql", "/adapters/a")).place == ""


async def test_a_restarted_controller_knows_all_names_before_it_loads(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters_module, "KNOW_S", 0.01)
    await fleet.load("sql", "/adapters/a")
    await fleet.restart_controller()
    with pytest.raises(WorkerUnavailableError, match="just starting"):
        await fleet.load("sql", "/adapters/b")
    await fleet.controller.step()
    with pytest.raises(AdapterConflictError):
        await fleet.load("sql", "/adapters/b")
