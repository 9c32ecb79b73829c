"""The controller without Ray: a scripted cluster, and workers that answer reports over real gRPC."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest

from lorafleet.controller.config import ServeConfig
from lorafleet.controller.fleet import actor as actor_module
from lorafleet.controller.fleet import owner as owner_module
from lorafleet.controller.fleet import retirement as retirement_module
from lorafleet.controller.fleet import worker_client as client_module
from lorafleet.controller.fleet import worker_life as life_module
from lorafleet.controller.fleet.actor import ControllerActor, FleetReady, Outcome
from lorafleet.controller.fleet.cluster import Node, WorkerLost
from lorafleet.proto import controller_pb2, controller_pb2_grpc, worker_pb2, worker_pb2_grpc
from lorafleet.workers.config import EngineConfig, LoRAModule
from lorafleet.workers.errors import NoRoomError
from lorafleet.workers.rpc import CLIENT_OPTIONS, bearer, create_server
from lorafleet.workers.server.actor import FleetSettings, WorkerFailed, WorkerReady
from lorafleet.workers.server.adapter_names import AdapterNames

TOKEN = "fleet-token"
TIMEOUT_S = 10.0
NAME = "lorafleet-worker-0"


@dataclass(eq=False)
class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """Answers reports. `silent` holds the answers back, like a hung process."""

    worker_id: str
    state: worker_pb2.WorkerState = worker_pb2.WORKER_READY
    num_unfinished: int = 0
    drained: bool = False
    adapters: dict[tuple[str, int], worker_pb2.Adapter] = field(default_factory=dict)
    names: AdapterNames = field(default_factory=AdapterNames)
    missing: set[str] = field(default_factory=set)  # roots
    answering: asyncio.Event = field(default_factory=asyncio.Event)
    server: Any = None
    address: str = ""

    async def start(self) -> None:
        self.answering.set()
        self.names.note(self.adapters.values())  # of the start-up
        self.server = create_server(TOKEN)
        cast(Any, worker_pb2_grpc.add_WorkerServicer_to_server)(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()

    async def kill(self) -> None:
        await self.server.stop(None)

    @property
    def ready(self) -> WorkerReady:
        return WorkerReady(
            worker_id=self.worker_id,
            generation=1,
            address=self.address,
            adapters=(),
            plan=("plan",),
            max_model_len=128,
            vocab_size=300,
            max_num_seqs=16,
            max_loras=4,
        )

    async def GetReport(self, request: Any, context: Any) -> worker_pb2.WorkerReport:
        await self.answering.wait()
        return worker_pb2.WorkerReport(worker_id=self.worker_id, generation=1, state=self.state)

    async def ListAdapters(self, request: Any, context: Any) -> worker_pb2.ListAdaptersReply:
        return worker_pb2.ListAdaptersReply(adapters=self.adapters.values(), names=self.names.all())

    async def NoteAdapters(self, request: Any, context: Any) -> worker_pb2.NoteAdaptersReply:
        self.names.note(request.adapters)
        return worker_pb2.NoteAdaptersReply()

    async def GetUse(self, request: Any, context: Any) -> worker_pb2.GetUseReply:
        return worker_pb2.GetUseReply()

    async def RegisterAdapter(self, request: Any, context: Any) -> worker_pb2.RegisterAdapterReply:
        if request.root in self.missing:
            failure = worker_pb2.Failure(code="adapter_refused", message="It is gone.", reason="missing_directory")
            return worker_pb2.RegisterAdapterReply(failure=failure)
        adapter = worker_pb2.Adapter(
            name=request.name, version=request.version, root=request.root, digest=f"digest of {request.root}"
        )
        self.adapters[request.name, request.version] = adapter
        return worker_pb2.RegisterAdapterReply(adapter=adapter)

    async def UnregisterAdapter(self, request: Any, context: Any) -> worker_pb2.UnregisterAdapterReply:
        del self.adapters[request.name, request.version]
        return worker_pb2.UnregisterAdapterReply(found=True)

    async def Drain(self, request: Any, context: Any) -> worker_pb2.DrainReply:
        self.drained = True
        self.num_unfinished = max(0, self.num_unfinished - 1)
        return worker_pb2.DrainReply(num_unfinished=self.num_unfinished)


StartWorker = Callable[..., Awaitable[FakeWorker]]


class FakeCluster:
    """Stands in for `WorkerCluster`; `answers` are the outcomes of the workers' starts, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.created: list[str] = []
        self.removed: list[str] = []
        self.restarted: list[str] = []
        self.answers: asyncio.Queue[WorkerReady | WorkerFailed | WorkerLost] = asyncio.Queue()
        self.ranks: dict[str, set[str]] = {}  # nodes of workers
        self.gateway_failure = ""
        self.hosting: list[str] = []  # nodes on which gateways were started
        self.has_room = True
        self.restarted_by_ray = False
        self.owners: set[str] = set()
        self.fleet_ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def fleet_id(self) -> str:
        return "fleet"

    def is_restarted(self) -> bool:
        return self.restarted_by_ray

    def has_owner(self, owner: str) -> bool:
        return owner in self.owners

    def end_fleet(self) -> None:
        self._loop.call_soon_threadsafe(self.fleet_ended.set)

    def worker_names(self) -> list[str]:
        return self.names

    def create_worker(
        self,
        name: str,
        config: EngineConfig,
        num_workers: int,
        adapters: Sequence[LoRAModule],
        fleet: FleetSettings,
    ) -> None:
        assert fleet == FleetSettings("127.0.0.1", TOKEN)
        if not self.has_room:
            raise NoRoomError("no room")
        if name not in self.names:
            self.created.append(name)
            self.names.append(name)

    async def worker_ready(self, name: str, timeout_s: float) -> WorkerReady | WorkerFailed:
        answer = await self.answers.get()
        if isinstance(answer, WorkerLost):
            raise answer
        return answer

    def remove_worker(self, name: str) -> None:
        self.removed.append(name)
        self.names.remove(name)

    def restart_worker(self, name: str) -> None:
        self.restarted.append(name)

    def nodes_of(self, name: str) -> set[str]:
        return self.ranks[name]

    def nodes(self) -> list[Node]:
        return [Node("head", "10.0.0.1", True)]

    def gateway_nodes(self) -> set[str]:
        return set()

    def host_gateways(self, node_id: str, actor: type, *args: object) -> None:
        self.hosting.append(node_id)

    async def gateways_listen(self, node_id: str, timeout_s: float) -> str:
        return self.gateway_failure

    def remove_gateways(self, node_id: str) -> None:
        pass


class Fleet:
    """A controller with a watcher."""

    def __init__(self, controller: ControllerActor, cluster: FakeCluster, port: int) -> None:
        self.controller = controller
        self.cluster = cluster
        self.port = port

    async def tables(self) -> AsyncIterator[controller_pb2.RoutingTable]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options=CLIENT_OPTIONS) as channel:
            stub = cast(Any, controller_pb2_grpc.ControllerStub)(channel)
            request = controller_pb2.WatchRequest(gateway_id="gateway")
            async for table in stub.Watch(request, metadata=bearer(TOKEN), timeout=TIMEOUT_S, wait_for_ready=True):
                yield table

    async def workers_become(self, *worker_ids: str) -> controller_pb2.RoutingTable:
        """Return the first table with exactly these workers."""
        async for table in self.tables():
            if [worker.worker_id for worker in table.workers] == list(worker_ids):
                return table
        raise AssertionError("the stream ended")

    async def serves(self, *worker_ids: str) -> None:
        """Wait for a table with exactly these workers, in any order."""
        async for table in self.tables():
            if sorted(worker.worker_id for worker in table.workers) == sorted(worker_ids):
                return


@pytest.fixture
async def start() -> AsyncIterator[StartWorker]:
    """Starts workers and stops them all in the end."""
    started: list[FakeWorker] = []

    async def start_worker(worker_id: str, **fields: Any) -> FakeWorker:
        worker = FakeWorker(worker_id, **fields)
        started.append(worker)
        await worker.start()
        return worker

    yield start_worker
    for worker in started:
        await worker.kill()


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    cluster = FakeCluster()
    monkeypatch.setattr(actor_module, "under_watch", lambda: asyncio.sleep(0))
    monkeypatch.setattr(actor_module, "AGAIN_S", 0.01)
    monkeypatch.setattr(actor_module, "WorkerCluster", lambda: cluster)
    monkeypatch.setattr(life_module, "POLL_S", 0.01)
    monkeypatch.setattr(retirement_module, "GRACE_S", 0.0)
    monkeypatch.setattr(retirement_module, "POLL_S", 0.01)
    monkeypatch.setattr(life_module, "RETRY_S", 0.01)
    monkeypatch.setattr(life_module, "RESTART_S", 0.01)
    return cluster


@pytest.fixture
async def fleet(model_dir: Path, cluster: FakeCluster, free_port: int) -> AsyncIterator[Fleet]:
    config = ServeConfig(EngineConfig(str(model_dir)), ("base",))
    controller = ControllerActor(config, "127.0.0.1", free_port, TOKEN)
    yield Fleet(controller, cluster, free_port)
    await stop(controller)


async def stop(controller: ControllerActor) -> None:
    for task in (controller._run, controller._watched):
        task.cancel()
    await asyncio.gather(controller._run, controller._watched, return_exceptions=True)
    server = getattr(controller, "_server", None)
    if server is not None:
        await server.stop(None)


async def ready(controller: ControllerActor) -> FleetReady | WorkerFailed:
    async with asyncio.timeout(TIMEOUT_S):
        return await controller.ready()


async def test_a_missing_worker_is_created_and_gets_into_the_table(fleet: Fleet, start: StartWorker) -> None:
    worker = await start("worker-a")
    fleet.cluster.answers.put_nowait(worker.ready)
    assert await ready(fleet.controller) == FleetReady(
        (worker.ready,), last_event=2, controller=f"127.0.0.1:{fleet.port}"
    )
    assert fleet.cluster.created == [NAME]
    table = await fleet.workers_become("worker-a")
    assert table.base.max_model_len == 128


async def test_several_workers_start_in_parallel_and_fail_alone(
    start: StartWorker, model_dir: Path, cluster: FakeCluster, free_port: int
) -> None:
    config = ServeConfig(EngineConfig(str(model_dir)), ("base",), num_workers=3)
    controller = ControllerActor(config, "127.0.0.1", free_port, TOKEN)
    fleet = Fleet(controller, cluster, free_port)
    workers = {worker_id: await start(worker_id) for worker_id in ("a", "b", "c")}
    for worker in workers.values():
        cluster.answers.put_nowait(worker.ready)
    answer = await ready(controller)
    assert isinstance(answer, FleetReady)
    assert {worker.worker_id for worker in answer.workers} == workers.keys()
    assert sorted(cluster.created) == [f"lorafleet-worker-{number}" for number in range(3)]
    await fleet.serves("a", "b", "c")
    await workers["b"].kill()
    await fleet.serves("a", "c")
    cluster.answers.put_nowait((await start("d")).ready)
    await fleet.serves("a", "c", "d")
    await stop(controller)


async def test_workers_that_run_already_are_kept_and_unwanted_ones_removed(
    start: StartWorker, model_dir: Path, cluster: FakeCluster, free_port: int
) -> None:
    cluster.names = [NAME, "lorafleet-worker-7"]
    cluster.answers.put_nowait((await start("worker-a")).ready)
    controller = ControllerActor(ServeConfig(EngineConfig(str(model_dir)), ("base",)), "127.0.0.1", free_port, TOKEN)
    assert isinstance(await ready(controller), FleetReady)
    assert (cluster.created, cluster.removed) == ([], ["lorafleet-worker-7"])
    await stop(controller)


async def test_a_worker_that_died_leaves_the_table_and_its_successor_enters_it(
    fleet: Fleet, start: StartWorker
) -> None:
    first = await start("worker-a")
    fleet.cluster.answers.put_nowait(first.ready)
    await fleet.workers_become("worker-a")
    await first.kill()
    await fleet.workers_become()
    fleet.cluster.answers.put_nowait(WorkerLost("restarting"))
    fleet.cluster.answers.put_nowait((await start("worker-b")).ready)
    table = await fleet.workers_become("worker-b")
    assert list(table.base.names) == ["base"]


async def test_a_worker_that_does_not_answer_leaves_the_table_until_it_does(
    fleet: Fleet, start: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "CALL_S", 0.05)
    monkeypatch.setattr(life_module, "LOST_S", 0.2)
    worker = await start("worker-a")
    fleet.cluster.answers.put_nowait(worker.ready)
    await fleet.workers_become("worker-a")
    worker.answering.clear()
    await fleet.workers_become()
    worker.answering.set()
    await fleet.workers_become("worker-a")


async def test_another_worker_at_the_same_address_is_not_taken_for_the_old_one(
    fleet: Fleet, start: StartWorker
) -> None:
    worker = await start("worker-a")
    fleet.cluster.answers.put_nowait(worker.ready)
    await fleet.workers_become("worker-a")
    worker.worker_id = "worker-b"
    await fleet.workers_become()
    fleet.cluster.answers.put_nowait(worker.ready)
    await fleet.workers_become("worker-b")


async def test_a_worker_whose_actor_is_gone_is_created_again(fleet: Fleet, start: StartWorker) -> None:
    worker = await start("worker-a")
    fleet.cluster.answers.put_nowait(worker.ready)
    await fleet.workers_become("worker-a")
    fleet.cluster.names.clear()
    await worker.kill()
    fleet.cluster.answers.put_nowait(WorkerLost("no such actor"))
    fleet.cluster.answers.put_nowait((await start("worker-b")).ready)
    await fleet.workers_become("worker-b")
    assert fleet.cluster.created == [NAME, NAME]


def started() -> dict[tuple[str, int], worker_pb2.Adapter]:
    return {("start-up", 1): worker_pb2.Adapter(name="start-up", version=1, root="/start-up", digest="d")}


async def test_a_restarted_worker_is_in_the_table_when_it_knows_what_was_loaded(
    fleet: Fleet, start: StartWorker
) -> None:
    worker = await start("worker-a", adapters=started())
    fleet.cluster.answers.put_nowait(worker.ready)
    table = await fleet.workers_become("worker-a")
    assert [adapter.name for adapter in table.adapters] == ["start-up"]
    updates = fleet.controller._updates
    updates._allowed = True
    adapter = await updates.load("sql", "/adapters/sql", load_inplace=False)
    await updates.unload("start-up")
    await worker.kill()
    await fleet.workers_become()
    again = await start("worker-b", adapters=started())
    fleet.cluster.answers.put_nowait(again.ready)
    table = await fleet.workers_become("worker-b")
    assert again.adapters["sql", adapter.version].digest == "digest of /adapters/sql"
    assert [(adapter.name, adapter.digest) for adapter in table.adapters] == [("sql", "digest of /adapters/sql")]
    assert not table.workers[0].lacking
    assert {adapter.name: adapter.unloaded for adapter in again.names.all()} == {"start-up": True, "sql": False}


async def test_a_restarted_controller_learns_everything_from_the_workers(
    start: StartWorker, model_dir: Path, cluster: FakeCluster, free_port: int
) -> None:
    config = ServeConfig(EngineConfig(str(model_dir)), ("base",), num_workers=2)
    workers = [await start(worker_id, adapters=started()) for worker_id in ("a", "b")]
    controller = ControllerActor(config, "127.0.0.1", free_port, TOKEN)
    for worker in workers:
        cluster.answers.put_nowait(worker.ready)
    await ready(controller)
    controller._updates._allowed = True
    await controller._updates.load("sql", "/adapters/sql", load_inplace=False)
    await controller._updates.unload("start-up")
    await stop(controller)
    await workers[1].kill()
    blank = await start("c", adapters=started())  # replaces the other one, and is asked first
    cluster.answers.put_nowait(blank.ready)
    cluster.answers.put_nowait(workers[0].ready)
    controller = ControllerActor(config, "127.0.0.1", free_port, TOKEN)
    fleet = Fleet(controller, cluster, free_port)
    async for table in fleet.tables():
        assert [adapter.name for adapter in table.adapters] == ["sql"], "no table before has been wrong"
        if len(table.workers) == 2 and not any(worker.lacking for worker in table.workers):
            break
    assert "sql" in {name for name, _ in blank.adapters}, "though it was heard first, and had nothing to do then"
    await stop(controller)


async def test_a_worker_that_cannot_load_an_adapter_serves_the_rest_and_the_table_says_so(
    fleet: Fleet, start: StartWorker
) -> None:
    worker = await start("worker-a")
    fleet.cluster.answers.put_nowait(worker.ready)
    await fleet.workers_become("worker-a")
    fleet.controller._updates._allowed = True
    await fleet.controller._updates.load("sql", "/adapters/sql", load_inplace=False)
    await worker.kill()
    await fleet.workers_become()
    again = await start("worker-b", missing={"/adapters/sql"})
    fleet.cluster.answers.put_nowait(again.ready)
    table = await fleet.workers_become("worker-b")
    assert [(lacking.name, lacking.reason) for lacking in table.workers[0].lacking] == [("sql", "missing_directory")]
    status = fleet.controller._lives[NAME].status()
    assert [(lacking.name, lacking.reason) for lacking in status.lacking] == [("sql", "missing_directory")]
    again.missing.clear()
    async for table in fleet.tables():
        if not table.workers[0].lacking:
            return


async def test_a_restarted_controller_takes_a_worker_whose_start_up_is_gone_without_it(
    start: StartWorker, model_dir: Path, cluster: FakeCluster, free_port: int
) -> None:
    cluster.names = [NAME]
    cluster.restarted_by_ray = True
    cluster.answers.put_nowait(WorkerFailed("adapter_refused", "Adapter 'sql': it is gone."))
    cluster.answers.put_nowait((await start("worker-b")).ready)
    config = ServeConfig(EngineConfig(str(model_dir)), ("base",))
    controller = ControllerActor(config, "127.0.0.1", free_port, TOKEN)
    await Fleet(controller, cluster, free_port).workers_become("worker-b")
    assert (cluster.removed, cluster.created) == ([NAME], [NAME])
    await stop(controller)


async def test_a_missing_adapter_of_the_start_up_does_not_keep_a_worker_from_restarting(
    fleet: Fleet, start: StartWorker
) -> None:
    worker = await start("worker-a")
    fleet.cluster.answers.put_nowait(worker.ready)
    await fleet.workers_become("worker-a")
    await worker.kill()
    fleet.cluster.answers.put_nowait(WorkerFailed("adapter_refused", "Adapter 'sql': it is gone."))
    fleet.cluster.answers.put_nowait((await start("worker-b")).ready)
    await fleet.workers_become("worker-b")
    assert (fleet.cluster.removed, fleet.cluster.created) == ([NAME], [NAME, NAME])
    assert not fleet.cluster.restarted


async def test_a_change_of_state_is_published(fleet: Fleet, start: StartWorker) -> None:
    worker = await start("worker-a")
    fleet.cluster.answers.put_nowait(worker.ready)
    await fleet.workers_become("worker-a")
    worker.state = worker_pb2.WORKER_DRAINING
    async for table in fleet.tables():
        if table.workers[0].state == worker_pb2.WORKER_DRAINING:
            break


async def test_a_worker_that_cannot_start_is_reported_with_its_reason(fleet: Fleet) -> None:
    failed = WorkerFailed("adapter_refused", "Adapter 'sql': rank 64 is over --max-lora-rank 16.")
    fleet.cluster.answers.put_nowait(failed)
    assert await ready(fleet.controller) == failed


async def test_later_on_a_worker_that_cannot_start_is_tried_until_it_can(fleet: Fleet, start: StartWorker) -> None:
    worker = await start("worker-a")
    fleet.cluster.answers.put_nowait(worker.ready)
    await fleet.workers_become("worker-a")
    await worker.kill()
    fleet.cluster.answers.put_nowait(WorkerFailed("bad_model", "The files are away."))
    fleet.cluster.answers.put_nowait((await start("worker-b")).ready)
    await fleet.workers_become("worker-b")
    assert fleet.cluster.restarted == [NAME]
    assert isinstance(await ready(fleet.controller), FleetReady)


async def test_a_model_without_tokenizer_fails_the_start(tmp_path: Path, cluster: FakeCluster, free_port: int) -> None:
    controller = ControllerActor(ServeConfig(EngineConfig(str(tmp_path)), ("base",)), "127.0.0.1", free_port, TOKEN)
    failed = await ready(controller)
    assert isinstance(failed, WorkerFailed) and failed.code == "bad_model"
    await stop(controller)


async def test_workers_are_restarted_one_after_the_other_each_after_its_requests(
    start: StartWorker, model_dir: Path, cluster: FakeCluster, free_port: int
) -> None:
    config = ServeConfig(EngineConfig(str(model_dir)), ("base",), num_workers=2)
    controller = ControllerActor(config, "127.0.0.1", free_port, TOKEN)
    fleet = Fleet(controller, cluster, free_port)
    old = [await start(worker_id, num_unfinished=3) for worker_id in ("a", "b")]
    for worker in old:
        cluster.answers.put_nowait(worker.ready)
    await ready(controller)
    await fleet.serves("a", "b")
    restart = asyncio.create_task(controller.restart_workers())
    left = {"a", "b"}
    for number, new in enumerate(("c", "d")):
        async with asyncio.timeout(TIMEOUT_S):
            while len(cluster.restarted) <= number:  # noqa: ASYNC110 (a plain thread calls the fake)
                await asyncio.sleep(0.005)
        drained = [worker for worker in old if worker.drained and worker.worker_id in left]
        assert len(drained) == 1 and drained[0].num_unfinished == 0
        left.remove(drained[0].worker_id)
        await drained[0].kill()
        await fleet.serves(*left, *("c", "d")[:number])
        assert len(cluster.restarted) == number + 1, "the next one waits until this one is back"
        cluster.answers.put_nowait((await start(new)).ready)
        await fleet.serves(*left, *("c", "d")[: number + 1])
    assert await restart == Outcome(True, "all 2 workers were restarted")
    assert cluster.restarted == ["lorafleet-worker-0", "lorafleet-worker-1"]
    await stop(controller)


async def test_of_two_restarts_the_second_begins_after_the_first(fleet: Fleet, start: StartWorker) -> None:
    worker = await start("a")
    fleet.cluster.answers.put_nowait(worker.ready)
    await fleet.workers_become("a")
    restarts = [asyncio.create_task(fleet.controller.restart_workers()) for _ in range(2)]
    for number, new in enumerate(("b", "c"), start=1):
        async with asyncio.timeout(TIMEOUT_S):
            while len(fleet.cluster.restarted) < number:  # noqa: ASYNC110 (a plain thread calls the fake)
                await asyncio.sleep(0.005)
        await worker.kill()
        await fleet.workers_become()
        assert len(fleet.cluster.restarted) == number
        worker = await start(new)
        fleet.cluster.answers.put_nowait(worker.ready)
        await fleet.workers_become(new)
    assert [outcome.succeeded for outcome in await asyncio.gather(*restarts)] == [True, True]


async def test_a_worker_that_stays_silent_is_ended(
    fleet: Fleet, start: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "CALL_S", 0.05)
    monkeypatch.setattr(life_module, "LOST_S", 0.2)
    monkeypatch.setattr(life_module, "ENDED_S", 0.6)
    worker = await start("worker-a")
    fleet.cluster.answers.put_nowait(worker.ready)
    await fleet.workers_become("worker-a")
    worker.answering.clear()
    await fleet.workers_become()
    assert fleet.cluster.restarted == []
    assert fleet.controller._lives[NAME].status().state == "silent"
    fleet.cluster.answers.put_nowait((await start("worker-b")).ready)
    await fleet.workers_become("worker-b")
    assert fleet.cluster.restarted == [NAME]


async def test_the_status_of_the_fleet_includes_missing_workers(fleet: Fleet, start: StartWorker) -> None:
    worker = await start("worker-a")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{fleet.port}", options=CLIENT_OPTIONS) as channel:
        stub = cast(Any, controller_pb2_grpc.ControllerStub)(channel)

        async def status() -> controller_pb2.WorkerStatus:
            call = stub.GetStatus(
                controller_pb2.StatusRequest(), metadata=bearer(TOKEN), timeout=TIMEOUT_S, wait_for_ready=True
            )
            answer: controller_pb2.FleetStatus = await call
            (only,) = answer.workers
            return only

        before = await status()
        assert (before.name, before.state, before.num_ranks, before.num_starts) == (NAME, "starting", 1, 0)
        assert not before.HasField("report")
        fleet.cluster.answers.put_nowait(worker.ready)
        await fleet.workers_become("worker-a")
        serving = await status()
        assert (serving.state, serving.num_starts, serving.report.worker_id) == ("ready", 1, "worker-a")
        assert (serving.max_num_seqs, serving.max_loras) == (16, 4)
        await worker.kill()
        await fleet.workers_become()
        assert (await status()).state == "starting"


async def test_a_worker_that_could_not_be_reached_for_a_moment_has_not_started_again(
    fleet: Fleet, start: StartWorker
) -> None:
    worker = await start("worker-a")
    fleet.cluster.answers.put_nowait(worker.ready)
    await fleet.workers_become("worker-a")
    worker.worker_id = "somebody else"
    await fleet.workers_become()
    worker.worker_id = "worker-a"
    fleet.cluster.answers.put_nowait(worker.ready)
    await fleet.workers_become("worker-a")
    assert fleet.controller._lives[NAME].status().num_starts == 1


async def test_it_tells_whether_it_was_started_with_these_arguments(fleet: Fleet) -> None:
    config = fleet.controller._config
    assert await fleet.controller.was_told(config, TOKEN, "none")
    assert not await fleet.controller.was_told(config, "another", "none")
    assert not await fleet.controller.was_told(config, TOKEN, "head")
    assert not await fleet.controller.was_told(replace(config, num_workers=2), TOKEN, "none")


@pytest.mark.parametrize(
    ("num_unfinished", "timeout_s", "outcome"),
    [
        (3, 5.0, Outcome(True, f"drained: {NAME}")),
        (10**9, 0.1, Outcome(False, f"not all of {NAME} drained within 0.1 s; other workers resume their requests")),
    ],
)
async def test_a_node_is_drained_with_the_workers_that_have_a_rank_there(
    start: StartWorker,
    model_dir: Path,
    cluster: FakeCluster,
    free_port: int,
    num_unfinished: int,
    timeout_s: float,
    outcome: Outcome,
) -> None:
    config = ServeConfig(EngineConfig(str(model_dir)), ("base",), num_workers=2)
    controller = ControllerActor(config, "127.0.0.1", free_port, TOKEN)
    workers = [await start(worker_id, num_unfinished=num_unfinished) for worker_id in ("a", "b")]
    for worker in workers:
        cluster.answers.put_nowait(worker.ready)
    await ready(controller)
    cluster.ranks = {NAME: {"first", "second"}, "lorafleet-worker-1": {"second"}}
    assert await controller.drain_node("third", 1.0) == Outcome(True, "no worker is on this node")
    assert await controller.drain_node("first", timeout_s) == outcome
    concerned = controller._lives[NAME].ready
    assert concerned is not None
    assert [worker.worker_id for worker in workers if worker.drained] == [concerned.worker_id]
    await stop(controller)


async def test_the_fleet_is_ready_when_its_gateways_listen_and_cannot_start_if_they_cannot(
    start: StartWorker, model_dir: Path, cluster: FakeCluster, free_port: int
) -> None:
    config = ServeConfig(EngineConfig(str(model_dir)), ("base",))
    cluster.answers.put_nowait((await start("worker-a")).ready)
    controller = ControllerActor(config, "127.0.0.1", free_port, TOKEN, gateways_on="head")
    answer = await ready(controller)
    assert isinstance(answer, FleetReady) and answer.gateway_nodes == ("10.0.0.1",)
    await stop(controller)
    cluster.gateway_failure = "the port is taken"
    cluster.answers.put_nowait((await start("worker-a")).ready)
    controller = ControllerActor(config, "127.0.0.1", free_port, TOKEN, gateways_on="head")
    assert await ready(controller) == WorkerFailed("bad_config", "On node 10.0.0.1: the port is taken")
    await stop(controller)


async def test_a_fleet_without_room_reports_it_starts_no_gateways_and_starts_once_there_is_room(
    start: StartWorker, model_dir: Path, cluster: FakeCluster, free_port: int
) -> None:
    cluster.has_room = False
    controller = ControllerActor(
        ServeConfig(EngineConfig(str(model_dir)), ("base",)), "127.0.0.1", free_port, TOKEN, gateways_on="head"
    )
    assert await ready(controller) == WorkerFailed("no_room", "no room")
    assert cluster.hosting == []
    cluster.answers.put_nowait((await start("worker-a")).ready)
    cluster.has_room = True
    async with asyncio.timeout(TIMEOUT_S):
        while isinstance(await controller.ready(), WorkerFailed):  # noqa: ASYNC110 (an earlier answer is no event)
            await asyncio.sleep(0.01)
    assert cluster.hosting == ["head"]
    await stop(controller)


class Restarted:
    """A controller of two workers that Ray has just restarted; `worker-a` runs."""

    def __init__(self, cluster: FakeCluster, model_dir: Path, port: int, owner: str = "") -> None:
        cluster.restarted_by_ray = True
        cluster.names = [NAME]
        config = ServeConfig(EngineConfig(str(model_dir)), ("base",), num_workers=2, drain_timeout_s=0)
        self.controller = ControllerActor(config, "127.0.0.1", port, TOKEN, gateways_on="none", owner=owner)

    async def says(self, text: str) -> None:
        """Wait until the controller has reported this."""
        number, lines = 0, [""]
        async with asyncio.timeout(TIMEOUT_S):
            while not any(text in line for line in lines):
                events = await self.controller.events(number)
                number, lines = max([number, *(new for new, _ in events)]), [line for _, line in events]


async def test_a_restarted_controller_serves_with_running_workers_and_starts_the_others_once_there_is_room(
    start: StartWorker, model_dir: Path, cluster: FakeCluster, free_port: int
) -> None:
    cluster.has_room = False
    restarted = Restarted(cluster, model_dir, free_port)
    cluster.answers.put_nowait((await start("worker-a")).ready)
    fleet = Fleet(restarted.controller, cluster, free_port)
    await restarted.says("the controller was started again")
    await restarted.says("no room")
    await fleet.serves("worker-a")
    cluster.has_room = True
    cluster.answers.put_nowait(WorkerLost("there is none"))
    cluster.answers.put_nowait((await start("worker-b")).ready)
    await fleet.serves("worker-a", "worker-b")
    assert isinstance(await ready(restarted.controller), FleetReady)
    told = [line for _, line in await restarted.controller.events(0)]
    assert told.count("no room") == 1
    await stop(restarted.controller)


async def test_a_restarted_controller_waits_for_its_port_and_its_models_files(
    start: StartWorker, model_dir: Path, cluster: FakeCluster, free_port: int
) -> None:
    (model_dir / "tokenizer.json").rename(model_dir / "away")
    with socket.create_server(("127.0.0.1", free_port)):
        restarted = Restarted(cluster, model_dir, free_port)
        await restarted.says("has no tokenizer.json")
        (model_dir / "away").rename(model_dir / "tokenizer.json")
        await restarted.says(f"cannot listen on 127.0.0.1:{free_port}")
    for worker_id in ("worker-a", "worker-b"):
        cluster.answers.put_nowait((await start(worker_id)).ready)
    await Fleet(restarted.controller, cluster, free_port).serves("worker-a", "worker-b")
    await stop(restarted.controller)


@pytest.mark.parametrize("is_restarted", [True, False])
async def test_a_controller_that_fails_says_so_and_ends_so_that_ray_starts_it_again(
    model_dir: Path, cluster: FakeCluster, free_port: int, monkeypatch: pytest.MonkeyPatch, is_restarted: bool
) -> None:
    def fail() -> list[str]:
        raise WorkerLost("Ray does not answer")

    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(actor_module, "FIRST_AGAIN_S", 0.2)
    monkeypatch.setattr(os, "_exit", ended.set_result)
    cluster.worker_names = fail  # type: ignore[method-assign]
    cluster.restarted_by_ray = is_restarted
    controller = ControllerActor(ServeConfig(EngineConfig(str(model_dir)), ("base",)), "127.0.0.1", free_port, TOKEN)
    if not is_restarted:
        failed = await ready(controller)
        assert isinstance(failed, WorkerFailed) and "Ray does not answer" in failed.message
        assert not ended.done(), "whoever has made the fleet hears of it first"
    async with asyncio.timeout(TIMEOUT_S):
        assert await ended == 1
    assert "Ray does not answer" in (await controller.events(0))[-1][1]
    await stop(controller)


async def test_a_fleet_ends_with_its_owner_and_not_while_ray_does_not_answer(
    start: StartWorker, model_dir: Path, cluster: FakeCluster, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner_module, "LOOK_S", 0.0)
    monkeypatch.setattr(owner_module, "GRACE_S", 0.0)
    cluster.owners = {"owner"}
    cluster.names = [NAME]
    cluster.answers.put_nowait((await start("worker-a")).ready)
    config = ServeConfig(EngineConfig(str(model_dir)), ("base",), drain_timeout_s=0)
    controller = ControllerActor(config, "127.0.0.1", free_port, TOKEN, gateways_on="none", owner="owner")
    assert isinstance(await ready(controller), FleetReady)
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def is_away(owner: str) -> bool:
        loop.call_soon_threadsafe(asked.set)
        raise WorkerLost("Ray does not answer")

    def has_owner(owner: str) -> bool:
        return owner in cluster.owners

    cluster.has_owner = is_away  # type: ignore[method-assign]
    async with asyncio.timeout(TIMEOUT_S):
        await asked.wait()
    assert not cluster.fleet_ended.is_set()
    cluster.owners.clear()
    cluster.has_owner = has_owner  # type: ignore[method-assign]
    async with asyncio.timeout(TIMEOUT_S):
        await cluster.fleet_ended.wait()
    assert not await controller.was_told(config, TOKEN, "none"), "no other command has it for its own"
    await stop(controller)


async def test_each_event_of_a_worker_is_reported_once(fleet: Fleet, start: StartWorker) -> None:
    worker = await start("worker-a")
    fleet.cluster.answers.put_nowait(worker.ready)
    await fleet.workers_become("worker-a")
    told = await fleet.controller.events(0)
    assert [line for _, line in told] == [
        f"{NAME} is worker-a, generation 1, at {worker.address}",
        f"{NAME} gets requests",
    ]
    waiting = asyncio.create_task(fleet.controller.events(told[-1][0]))
    await worker.kill()
    async with asyncio.timeout(TIMEOUT_S):
        ((number, line),) = await waiting
    assert line == f"{NAME} is lost (worker-a, generation 1): its process has ended"
    assert number == 3
    assert await fleet.controller.events(1000) == [*told, (number, line)], "a number of an earlier controller"
