"""Loading and unloading on all workers or none, with workers whose disks are dictionaries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from lorafleet.controller import adapters as adapters_module
from lorafleet.controller.adapters import AdapterUpdates, Freed
from lorafleet.controller.catalogue import Catalogue
from lorafleet.controller.worker_client import WorkerClient
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

ROOTS = ("/adapters",)


class CallFailed(grpc.aio.AioRpcError):
    def __init__(self, code: grpc.StatusCode) -> None:
        super().__init__(code, grpc.aio.Metadata(), grpc.aio.Metadata())


@dataclass(eq=False)
class FakeClient:
    """A worker: what its disk holds at each root, and what it has registered."""

    disk: dict[str, str] = field(default_factory=lambda: {"/adapters/a": "content a", "/adapters/b": "content b"})
    known: dict[tuple[str, int], worker_pb2.Adapter] = field(default_factory=dict)
    lost: bool = False
    draining: bool = False
    roots: list[tuple[str, ...]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def adapters(self) -> list[worker_pb2.Adapter]:
        return list(self.known.values())

    async def register(self, adapter: worker_pb2.Adapter, allowed_roots: Sequence[str] = ()) -> worker_pb2.Adapter:
        self.roots.append(tuple(allowed_roots))
        await self.gate.wait()
        if self.lost:
            raise CallFailed(grpc.StatusCode.UNAVAILABLE)
        if adapter.root not in self.disk:
            raise AdapterRefusedError(f"{adapter.root} is not there.", reason="missing_directory")
        found = worker_pb2.Adapter()
        found.CopyFrom(adapter)
        found.digest = self.disk[adapter.root]
        self.known[adapter.name, adapter.version] = found
        return found

    async def unregister(self, adapter: worker_pb2.Adapter, timeout_s: float) -> worker_pb2.UnregisterAdapterReply:
        if self.lost:
            raise CallFailed(grpc.StatusCode.UNAVAILABLE)
        found = self.known.pop((adapter.name, adapter.version), None) is not None
        if self.draining:
            raise CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED)
        return worker_pb2.UnregisterAdapterReply(found=found, device_bytes=10 * found, host_bytes=3 * found)


@dataclass
class Fleet:
    catalogue: Catalogue
    workers: list[FakeClient]
    updates: AdapterUpdates
    published: list[dict[str, str]]  # name → digest, after each change

    def names(self) -> dict[str, str]:
        return {adapter.name: adapter.digest for adapter in self.catalogue.table().adapters}

    async def load(self, name: str, root: str, *, load_inplace: bool = False) -> worker_pb2.Adapter:
        return await self.updates.load(name, root, load_inplace=load_inplace)


def make_fleet(num_workers: int = 2, *, allowed: bool = True) -> Fleet:
    catalogue = Catalogue(names=("base",), root="/base", tokenizer_digest="t", created=1)
    catalogue.adopt([])
    workers = [FakeClient() for _ in range(num_workers)]
    published: list[dict[str, str]] = []
    told: list[str] = []
    updates = AdapterUpdates(
        catalogue,
        lambda: cast(Any, workers),
        lambda: published.append(fleet.names()),
        allowed=allowed,
        roots=ROOTS,
        tell=lambda line, level: told.append(line),
    )
    fleet = Fleet(catalogue, workers, updates, published)
    return fleet


@pytest.fixture
async def fleet(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    monkeypatch.setattr(adapters_module, "GRACE_S", 0.0)
    fleet = make_fleet()
    yield fleet
    await fleet.updates.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)


async def refused(fleet: Fleet, name: str, root: str, kind: type[LoRAFleetError], match: str) -> LoRAFleetError:
    """Loading fails and changes nothing."""
    names, known = fleet.names(), [dict(worker.known) for worker in fleet.workers]
    with pytest.raises(kind, match=match) as caught:
        await fleet.load(name, root)
    assert fleet.names() == names
    assert [worker.known for worker in fleet.workers if not worker.lost] == [
        before for worker, before in zip(fleet.workers, known, strict=True) if not worker.lost
    ]
    return caught.value


async def test_an_adapter_is_on_every_worker_before_its_name_is_published(fleet: Fleet) -> None:
    fleet.workers[1].gate.clear()
    loading = asyncio.ensure_future(fleet.load("sql", "/adapters/a"))
    await until(lambda: fleet.workers[0].known)
    assert not fleet.published
    fleet.workers[1].gate.set()
    adapter = await loading
    assert (adapter.name, adapter.version, adapter.digest) == ("sql", 1, "content a")
    assert fleet.published == [{"sql": "content a"}]
    assert all(worker.known.keys() == {("sql", 1)} for worker in fleet.workers)
    assert all(worker.roots == [ROOTS] for worker in fleet.workers)


async def test_what_one_worker_refuses_is_on_none(fleet: Fleet) -> None:
    del fleet.workers[1].disk["/adapters/a"]
    error = await refused(fleet, "sql", "/adapters/a", AdapterRefusedError, "is not there")
    assert isinstance(error, AdapterRefusedError) and error.reason == "missing_directory"
    assert not fleet.published


async def test_workers_that_see_different_files_are_no_fleet(fleet: Fleet) -> None:
    fleet.workers[1].disk["/adapters/a"] = "other content"
    await refused(fleet, "sql", "/adapters/a", AdapterRefusedError, "not the same on all workers")


async def test_a_worker_that_is_lost_meanwhile_fails_the_load(fleet: Fleet) -> None:
    fleet.workers[1].lost = True
    await refused(fleet, "sql", "/adapters/a", WorkerUnavailableError, "Nothing changed")


async def test_without_workers_nothing_can_be_loaded(fleet: Fleet) -> None:
    fleet.workers.clear()
    await refused(fleet, "sql", "/adapters/a", WorkerUnavailableError, "No worker")


@pytest.mark.parametrize(
    ("name", "root", "kind", "match"),
    [
        ("base", "/adapters/a", AdapterConflictError, "base model"),
        ("", "/adapters/a", InvalidRequestError, "must be given"),
        ("sql", "", InvalidRequestError, "must be given"),
        ("x" * 257, "/adapters/a", InvalidRequestError, "256"),
        ("a\nb", "/adapters/a", InvalidRequestError, "printable"),
    ],
)
async def test_a_name_must_be_one(name: str, root: str, kind: type[LoRAFleetError], match: str, fleet: Fleet) -> None:
    await refused(fleet, name, root, kind, match)


async def test_a_taken_name_is_replaced_only_in_place_and_the_old_version_goes(fleet: Fleet) -> None:
    await fleet.load("sql", "/adapters/a")
    await refused(fleet, "sql", "/adapters/b", AdapterConflictError, "already been loaded")
    adapter = await fleet.load("sql", "/adapters/b", load_inplace=True)
    assert (adapter.version, fleet.names()) == (2, {"sql": "content b"})
    await until(lambda: not any(("sql", 1) in worker.known for worker in fleet.workers))
    assert all(worker.known.keys() == {("sql", 2)} for worker in fleet.workers)


async def test_weight_and_pin_go_to_the_workers_and_into_the_table(fleet: Fleet) -> None:
    await fleet.updates.load("sql", "/adapters/a", load_inplace=False, weight=2.5, pin=True)
    (adapter,) = fleet.catalogue.table().adapters
    assert (adapter.weight, adapter.pin) == (2.5, True)
    worker = FakeClient()
    await fleet.updates.sync(cast(WorkerClient, worker))
    assert (worker.known["sql", 1].weight, worker.known["sql", 1].pin) == (2.5, True)
    for weight in (0.0, -1.0, 1e4, float("nan")):
        with pytest.raises(InvalidRequestError, match="weight is"):
            await fleet.updates.load("other", "/adapters/b", load_inplace=False, weight=weight)


async def test_a_failed_replacement_leaves_the_old_version_serving(fleet: Fleet) -> None:
    await fleet.load("sql", "/adapters/a")
    with pytest.raises(AdapterRefusedError):
        await fleet.load("sql", "/adapters/nowhere", load_inplace=True)
    assert fleet.names() == {"sql": "content a"}
    assert all(worker.known.keys() == {("sql", 1)} for worker in fleet.workers)


async def test_loads_of_one_name_come_one_after_the_other(fleet: Fleet) -> None:
    results = await asyncio.gather(*(fleet.load("sql", "/adapters/a") for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(result, worker_pb2.Adapter) for result in results) == 1
    assert sum(isinstance(result, AdapterConflictError) for result in results) == 4


async def test_a_caller_who_goes_away_leaves_nothing_half_done(fleet: Fleet) -> None:
    fleet.workers[0].gate.clear()
    loading = asyncio.ensure_future(fleet.load("sql", "/adapters/a"))
    await until(lambda: fleet.workers[1].known)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    fleet.workers[0].gate.set()
    await until(lambda: fleet.published)
    assert fleet.names() == {"sql": "content a"}


async def test_unloading_takes_the_name_away_first_and_says_what_it_freed(fleet: Fleet) -> None:
    await fleet.load("sql", "/adapters/a")
    assert await fleet.updates.unload("sql") == Freed(device_bytes=20, host_bytes=6, num_draining=0)
    assert fleet.published[-1] == {}
    assert not any(worker.known for worker in fleet.workers)
    with pytest.raises(UnknownModelError):
        await fleet.updates.unload("sql")


async def test_unloading_says_which_workers_still_drain_and_forgets_those_that_are_lost(fleet: Fleet) -> None:
    await fleet.load("sql", "/adapters/a")
    fleet.workers[0].draining, fleet.workers[1].lost = True, True
    assert await fleet.updates.unload("sql") == Freed(device_bytes=0, host_bytes=0, num_draining=1)


async def test_a_worker_that_comes_back_gets_what_it_lacks_and_loses_what_was_unloaded(fleet: Fleet) -> None:
    await fleet.load("sql", "/adapters/a")
    await fleet.load("sql", "/adapters/b", load_inplace=True)
    stray, old = (worker_pb2.Adapter(name=name, version=1, digest="content a") for name in ("gone", "sql"))
    worker = FakeClient(known={("gone", 1): stray, ("sql", 1): old})
    assert await fleet.updates.sync(cast(WorkerClient, worker)) == []
    assert {key: adapter.digest for key, adapter in worker.known.items()} == {("sql", 2): "content b"}
    assert worker.roots == [()], "what was allowed once is not asked again"


async def test_what_a_worker_cannot_have_again_is_named_and_hurts_no_other(fleet: Fleet) -> None:
    await fleet.load("a", "/adapters/a")
    await fleet.load("b", "/adapters/b")
    worker = FakeClient(disk={"/adapters/a": "content a", "/adapters/b": "changed"})
    assert await fleet.updates.sync(cast(WorkerClient, worker)) == ["b"]
    assert worker.known.keys() == {("a", 1)}


async def test_the_same_version_with_other_content_is_not_the_same(fleet: Fleet) -> None:
    await fleet.load("sql", "/adapters/a")
    worker = FakeClient(known={("sql", 1): worker_pb2.Adapter(name="sql", version=1, digest="other")})
    assert await fleet.updates.sync(cast(WorkerClient, worker)) == []
    assert worker.known["sql", 1].digest == "content a"


async def test_a_worker_that_comes_during_a_load_gets_it_too(fleet: Fleet) -> None:
    fleet.workers[0].gate.clear()
    loading = asyncio.ensure_future(fleet.load("sql", "/adapters/a"))
    await asyncio.sleep(0)
    late = FakeClient()
    await fleet.updates.sync(cast(WorkerClient, late))
    fleet.workers.append(late)
    fleet.workers[0].gate.set()
    await loading
    assert late.known.keys() == {("sql", 1)}


async def test_nothing_is_changed_where_that_is_not_allowed() -> None:
    fleet = make_fleet(allowed=False)
    with pytest.raises(NotFoundError, match="--allow-runtime-lora-updates"):
        await fleet.load("sql", "/adapters/a")
    with pytest.raises(NotFoundError, match="--allow-runtime-lora-updates"):
        await fleet.updates.unload("sql")
