"""A controller's adapters and workers without gRPC, Ray or time: workers are dictionaries, and calls can be lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import grpc.aio

from lorafleet.controller.fleet.adapters import AdapterUpdates
from lorafleet.controller.fleet.catalogue import Catalogue
from lorafleet.controller.fleet.retirement import Retirement
from lorafleet.controller.fleet.worker_adapters import FleetAdapters, WorkerAdapters
from lorafleet.proto import worker_pb2
from lorafleet.workers.errors import AdapterRefusedError
from lorafleet.workers.server.actor import WorkerReady
from lorafleet.workers.server.adapter_names import AdapterNames

ROOTS = ("/adapters",)
RESUME_S = 60.0


class CallFailed(grpc.aio.AioRpcError):  # type: ignore[misc]  # grpc has no types
    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        super().__init__(code, grpc.aio.Metadata(), grpc.aio.Metadata())


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def ms(self) -> int:
        return int(self.now * 1000)


@dataclass(eq=False)
class FakeClient:
    """A worker process behind `WorkerClient`'s calls: the content of its disk by root, and its registered adapters."""

    disk: dict[str, str] = field(default_factory=lambda: {f"/adapters/{name}": f"content {name}" for name in "abc"})
    known: dict[tuple[str, int], worker_pb2.Adapter] = field(default_factory=dict)
    names: AdapterNames = field(default_factory=AdapterNames)
    reachable: bool = True
    draining: bool = False  # unregistered adapters are not freed in time
    lose_answers: set[str] = field(default_factory=set)  # methods that take effect though their answers are lost
    in_use: set[str] = field(default_factory=set)  # digests
    requests: list[worker_pb2.Adapter] = field(default_factory=list)  # to register
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    registered: Callable[[worker_pb2.Adapter], None] = lambda adapter: None

    def __post_init__(self) -> None:
        self.gate.set()

    async def adapters(self) -> worker_pb2.ListAdaptersReply:
        await self._arrive()
        return worker_pb2.ListAdaptersReply(adapters=self.known.values(), names=self.names.all())

    async def note(self, adapters: Iterable[worker_pb2.Adapter]) -> None:
        await self._arrive()
        self.names.note(adapters)
        await self._answer("note")

    async def used(self, digests: Sequence[str], cut_s: float) -> set[str]:
        await self._arrive()
        return self.in_use.intersection(digests)

    async def register(self, adapter: worker_pb2.Adapter) -> worker_pb2.Adapter:
        self.requests.append(adapter)
        await self.gate.wait()
        await self._arrive()
        key = adapter.name, adapter.version
        root = adapter.place or adapter.root
        if key not in self.known:
            content = self.disk.get(root)
            if content is None:
                raise AdapterRefusedError(f"{root} is not there.", reason="missing_directory")
            found = worker_pb2.Adapter()
            found.CopyFrom(adapter)
            found.digest, found.place = content, root
            self._check(adapter, found)
            self.known[key] = found
            self.registered(found)
        self._check(adapter, self.known[key])
        await self._answer("register")
        return self.known[key]

    async def unregister(self, name: str, version: int, timeout_s: float) -> worker_pb2.UnregisterAdapterReply:
        await self._arrive()
        found = self.known.pop((name, version), None) is not None
        await self._answer("unregister")
        if self.draining:
            raise CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED)
        return worker_pb2.UnregisterAdapterReply(found=found, device_bytes=10 * found, host_bytes=3 * found)

    def serves(self) -> dict[str, set[str]]:
        """Return its digests by name."""
        served: dict[str, set[str]] = {}
        for (name, _), adapter in self.known.items():
            served.setdefault(name, set()).add(adapter.digest)
        return served

    @staticmethod
    def _check(wanted: worker_pb2.Adapter, found: worker_pb2.Adapter) -> None:
        if wanted.digest and wanted.digest != found.digest:
            raise AdapterRefusedError("It has changed.", reason="changed")

    async def _arrive(self) -> None:
        await asyncio.sleep(0)
        if not self.reachable:
            raise CallFailed()

    async def _answer(self, method: str) -> None:
        await asyncio.sleep(0)
        if method in self.lose_answers or not self.reachable:
            self.lose_answers.discard(method)
            raise CallFailed()


class Controller:
    """One run of a controller over worker processes, by worker name. Time passes in steps."""

    def __init__(
        self,
        clients: Mapping[str, FakeClient],
        clock: Clock,
        *,
        of_start: Sequence[str] = (),
        allowed: bool = True,
        is_restart: bool = False,
    ) -> None:
        self.clients = clients
        self.clock = clock
        self.published: list[dict[str, str]] = []  # name → digest, after each change
        self.told: list[str] = []
        self.workers: dict[str, WorkerAdapters] = {}  # those whose process has listed its adapters
        self.in_table: set[str] = set()
        self.catalogue = Catalogue(
            names=("base",),
            root="/base",
            tokenizer_digest="t",
            created=1,
            now_ms=clock.ms,
            fleet="fleet",
            of_start=of_start,
        )
        self.retirement = Retirement(self._serving, self.catalogue.digests, resume_s=RESUME_S, clock=clock)
        self.updates = AdapterUpdates(
            self.catalogue,
            self.retirement,
            self._serving,
            self._changed,
            allowed=allowed,
            roots=ROOTS,
            tell=self._tell,
        )
        self.fleet = FleetAdapters(
            catalogue=self.catalogue,
            retirement=self.retirement,
            staging=self.updates.staging,
            changed=self._changed,
            learned=self._learned,
            all_heard=lambda: self.workers.keys() == self.clients.keys(),
            tell=self._tell,
        )
        if is_restart:
            self.retirement.worker_lost()
            self.catalogue.await_word(clients)

    def names(self) -> dict[str, str]:
        """Return the digest of each name in the table."""
        return {adapter.name: adapter.digest for adapter in self.catalogue.table().adapters}

    def lacking(self, name: str) -> dict[str, str]:
        """Return the adapters a worker lacks in the table, with reasons."""
        for worker in self.catalogue.table().workers:
            if worker.worker_id == name:
                return {lacking.name: lacking.reason for lacking in worker.lacking}
        raise KeyError(name)

    async def step(self) -> None:
        """Look at each worker once: reconcile it, and put it into the table if it answers."""
        for name, client in self.clients.items():
            worker = self.workers.get(name)
            if worker is None:
                worker = WorkerAdapters(name, cast(Any, client), self.fleet, clock=self.clock)
            try:
                await worker.step()
            except grpc.aio.AioRpcError:
                self.lose(name, is_dead=False)
                continue
            self.workers[name] = worker
            await asyncio.gather(*worker._loaders)
            self.catalogue.heard(name)
            self.in_table.add(name)
            ready = WorkerReady(
                worker_id=name,
                generation=1,
                address=name,
                adapters=(),
                plan=(),
                max_model_len=128,
                vocab_size=300,
                max_num_seqs=16,
                max_loras=4,
            )
            self.catalogue.put_worker(ready, worker_pb2.WORKER_READY, worker.lacking)

    async def settle(self, rounds: int = 5) -> None:
        """Step until nothing is left to do; a minute passes in each round."""
        for _ in range(rounds):
            self.clock.now += 61.0
            await self.step()
            await self.retirement.step()
            await asyncio.gather(*self.retirement._dropping)

    def lose(self, name: str, *, is_dead: bool = True) -> None:
        """Take a worker out of the table; a dead one has forgotten everything."""
        if name in self.in_table:
            self.in_table.discard(name)
            self.catalogue.drop_worker(name)
            self.retirement.worker_lost()
        if is_dead:
            self.workers.pop(name, None)
            self.catalogue.heard(name)

    async def kill(self) -> None:
        """Stop the controller in the middle of its work."""
        await self.updates.close()
        await self.retirement.close()
        for worker in self.workers.values():
            for task in list(worker._loaders):
                task.cancel()
            await asyncio.gather(*worker._loaders, return_exceptions=True)

    def _serving(self) -> list[WorkerAdapters]:
        return [self.workers[name] for name in sorted(self.in_table)]

    def _changed(self) -> None:
        self.published.append(self.names())

    def _learned(self) -> None:
        self._changed()
        for worker in self.workers.values():
            worker.wake()

    def _tell(self, line: str, level: int) -> None:
        self.told.append(line)
