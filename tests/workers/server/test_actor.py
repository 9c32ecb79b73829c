"""The worker actor without Ray: its report on its start. The engine is replaced."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc.aio
import pytest

from lorafleet.proto import worker_pb2, worker_pb2_grpc
from lorafleet.workers.adapters.folder import AdapterFolder
from lorafleet.workers.config import EngineConfig, LoRAConfig, LoRAModule
from lorafleet.workers.engine import loop as loop_module
from lorafleet.workers.errors import AdapterRefusedError, LoRAFleetError, MemoryPlanError
from lorafleet.workers.rpc import bearer
from lorafleet.workers.scheduling.stats import EngineStats
from lorafleet.workers.server.actor import FleetSettings, WorkerActor, WorkerFailed, WorkerReady, leave_ray_niceness
from lorafleet.workers.switch_interval import SWITCH_INTERVAL_S

TOKEN = "fleet-token"
CONFIG = EngineConfig("/model", max_num_seqs=16, num_threads=1, lora=LoRAConfig(max_loras=4))


class FakeEngine:
    """An engine that records the calls of a start, in order, in `done`."""

    max_model_len, vocab_size = 128, 300
    memory = SimpleNamespace(max_loras=4)
    done: list[str]
    failure: LoRAFleetError | None

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._woken = threading.Event()

    @classmethod
    def from_config(cls, config: EngineConfig) -> FakeEngine:
        if cls.failure is not None:
            raise cls.failure
        cls.done.append("plan")
        return cls(config)

    def read_adapter(self, path: str, *, roots: object = None) -> Any:
        if "bad" in path:
            raise AdapterRefusedError(f"{path} has no adapter_config.json.", reason="not_peft")
        self.done.append(path)
        return SimpleNamespace(
            digest=f"digest of {path}",
            lora_rank=8,
            path=Path(path),
            folder=AdapterFolder.at(Path(path)),
            vocab_size=300,
            not_composable="",
        )

    def prefetch_adapter(self, digest: str) -> None:
        pass

    def add_adapter(self, spec: Any) -> None:
        pass

    def describe(self) -> list[str]:
        return ["memory plan", "  weights"]

    def load(self) -> None:
        self.done.append("load")

    def use_tokenizers(self, tokenizer_of: object) -> None:
        self.done.append("use tokenizers")

    def prepare_grammars(self) -> None:
        self.done.append("prepare grammars")

    def stats(self) -> EngineStats:
        return EngineStats()

    def take_cores(self) -> None:
        """Do nothing, since it computes nothing."""

    def fail(self) -> None:
        pass

    def bind_thread(self) -> None:
        pass

    def wait_for_work(self, timeout_s: float | None = None) -> bool:
        self._woken.wait(timeout_s)
        return False

    def wake(self) -> None:
        self._woken.set()


@pytest.fixture(autouse=True)
def switch_interval() -> Iterator[None]:
    """An actor sets its process's; this one gets its own back."""
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    FakeEngine.done, FakeEngine.failure = [], None
    monkeypatch.setattr(loop_module, "Engine", FakeEngine)
    return FakeEngine


@pytest.fixture
async def actors() -> AsyncIterator[list[WorkerActor]]:
    """Actors that are stopped after the test."""
    started: list[WorkerActor] = []
    yield started
    for actor in started:
        if hasattr(actor, "_server"):
            await actor._server.stop(None)
            await actor._service.stop()


async def start(
    actors: list[WorkerActor], *adapters: LoRAModule, fleet: FleetSettings | None = None
) -> WorkerReady | WorkerFailed:
    actors.append(WorkerActor(CONFIG, adapters, fleet or FleetSettings("127.0.0.1", TOKEN)))
    async with asyncio.timeout(10):
        return await actors[-1].ready()


async def test_its_loop_gets_the_interpreter_from_the_engine_soon(actors: list[WorkerActor]) -> None:
    await start(actors)
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)


async def test_a_worker_says_what_it_serves_and_answers_there(actors: list[WorkerActor]) -> None:
    ready = await start(actors, LoRAModule("sql", "/sql"), LoRAModule("json", "org/json", "base"))
    assert isinstance(ready, WorkerReady)
    assert [(adapter.name, adapter.digest, adapter.root, adapter.parent) for adapter in ready.adapters] == [
        ("sql", "digest of /sql", "/sql", ""),
        ("json", "digest of org/json", "org/json", "base"),
    ]
    assert ready.plan == ("memory plan", "  weights")
    assert (ready.max_model_len, ready.vocab_size, ready.max_num_seqs, ready.max_loras) == (128, 300, 16, 4)
    async with grpc.aio.insecure_channel(ready.address) as channel:
        stub = cast(Any, worker_pb2_grpc.WorkerStub)(channel)
        report = await stub.GetReport(worker_pb2.ReportRequest(), metadata=bearer(TOKEN), timeout=10)
    assert (report.worker_id, report.generation) == (ready.worker_id, ready.generation)


async def test_names_of_the_start_up_are_noted_and_files_that_changed_are_not_taken_for_what_was_loaded(
    actors: list[WorkerActor],
) -> None:
    ready = await start(actors, LoRAModule("sql", "/sql"))
    assert isinstance(ready, WorkerReady)
    async with grpc.aio.insecure_channel(ready.address) as channel:
        stub = cast(Any, worker_pb2_grpc.WorkerStub)(channel)
        call = {"metadata": bearer(TOKEN), "timeout": 10}
        listed = await stub.ListAdapters(worker_pb2.ListAdaptersRequest(), **call)
        assert list(listed.names) == list(listed.adapters) == list(ready.adapters)
        assert [(adapter.version, adapter.place) for adapter in listed.names] == [(1, "/sql")]
        again = worker_pb2.RegisterAdapterRequest(
            name="sql", version=1, root="/sql", digest="digest of /sql", created=listed.names[0].created
        )
        assert (await stub.RegisterAdapter(again, **call)).adapter.digest == "digest of /sql"
        other = worker_pb2.RegisterAdapterRequest(name="sql", version=2, root="/sql", digest="what was loaded")
        refused = (await stub.RegisterAdapter(other, **call)).failure
        assert (refused.code, refused.reason) == ("adapter_refused", "changed")
        assert len((await stub.ListAdapters(worker_pb2.ListAdaptersRequest(), **call)).adapters) == 1


async def test_workers_of_one_host_take_the_next_free_port_of_those_they_are_given(actors: list[WorkerActor]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fleet = FleetSettings("127.0.0.1", TOKEN, ports=(port, port + 9))
        workers = [await start(actors, fleet=fleet) for _ in range(2)]
        ports = [int(worker.address.rpartition(":")[2]) for worker in workers if isinstance(worker, WorkerReady)]
        assert port < ports[0] < ports[1] <= port + 9
        fleet = FleetSettings("127.0.0.1", TOKEN, ports=(port, port))
        failed = WorkerFailed(
            "bad_config", f"No port of --worker-ports {port}-{port} is free on 127.0.0.1. Give a wider range."
        )
        assert await start(actors, fleet=fleet) == failed


async def test_adapters_are_checked_before_the_weights_are_read(
    actors: list[WorkerActor], engine: type[FakeEngine]
) -> None:
    await start(actors, LoRAModule("sql", "/sql"))
    assert engine.done == ["plan", "/sql", "load", "use tokenizers", "prepare grammars"]


async def test_a_refused_adapter_is_named_and_the_weights_are_not_read(
    actors: list[WorkerActor], engine: type[FakeEngine]
) -> None:
    failed = await start(actors, LoRAModule("sql", "/sql"), LoRAModule("mine", "/bad"))
    assert failed == WorkerFailed("adapter_refused", "Adapter 'mine': /bad has no adapter_config.json.")
    assert "load" not in engine.done


async def test_a_plan_that_does_not_fit_is_reported(actors: list[WorkerActor], engine: type[FakeEngine]) -> None:
    engine.failure = MemoryPlanError("Lower --max-loras.")
    assert await start(actors) == WorkerFailed("memory_plan", "Lower --max-loras.")


async def test_every_start_is_another_worker_of_a_later_generation(actors: list[WorkerActor]) -> None:
    first, second = await start(actors), await start(actors)
    assert isinstance(first, WorkerReady) and isinstance(second, WorkerReady)
    assert first.worker_id != second.worker_id
    assert first.generation < second.generation
    assert first.address != second.address


async def test_ready_can_be_asked_again_and_again(actors: list[WorkerActor]) -> None:
    ready = await start(actors)
    assert await asyncio.gather(*(actors[0].ready() for _ in range(3))) == [ready] * 3


@pytest.mark.parametrize(
    ("niceness", "is_allowed", "asked"),
    [(15, True, [0]), (15, False, [0]), (0, True, []), (10, True, []), (19, True, [])],
)
def test_a_worker_leaves_the_priority_that_ray_gives_it_and_keeps_any_other(
    niceness: int, is_allowed: bool, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def set_priority(which: int, who: int, wanted: int) -> None:
        seen.append(wanted)
        if not is_allowed:
            raise PermissionError

    monkeypatch.setattr(os, "getpriority", lambda which, who: niceness)
    monkeypatch.setattr(os, "setpriority", set_priority)
    leave_ray_niceness()
    assert seen == asked
