"""Adapter versions that no name stands for any more, kept on all workers while any request may need them.

A request ends with the version it began with; if its worker dies, it resumes on another one, which must still have that
version. So a version is freed on all workers together: once no worker has a request for it, and no worker was lost so
recently that its requests may still be moving. Leaves to others: the adapter each name stands for (catalogue.py), the
calls (worker_client.py).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc.aio

from lorafleet.controller.fleet.reconcile import Key
from lorafleet.proto import worker_pb2

GRACE_S = 2.0  # between a new table and the first check: gateways may just have resolved a name to the old version
POLL_S = 0.5
FREE_S = 30.0  # for a worker to free an unused version
NOTICE_S = 5.0  # for gateways to notice that a worker is lost


@dataclass(frozen=True, slots=True)
class Freed:
    """The memory an unload has freed, on all workers together."""

    device_bytes: int = 0
    host_bytes: int = 0
    num_draining: int = 0  # workers that still run requests with it, and free it later


class Worker(Protocol):
    """The part of worker_adapters.py's `WorkerAdapters` used here."""

    async def used(self, digests: Sequence[str], cut_s: float) -> set[str]: ...
    async def unregister(self, key: Key, timeout_s: float) -> worker_pb2.UnregisterAdapterReply | None: ...


@dataclass(slots=True, eq=False)
class _Retired:
    adapter: worker_pb2.Adapter
    since: float
    freed: asyncio.Future[Freed]
    num_users: int = 0  # workers that, when last asked, had requests for it or did not answer
    is_used: bool = False


class Retirement:
    """The retired versions: `add` one; `run` until the controller ends."""

    def __init__(
        self,
        workers: Callable[[], Collection[Worker]],
        named: Callable[[], Collection[str]],
        *,
        resume_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """workers: those in the table. named: digests of all loaded adapters, whose content is never freed.

        resume_s: how long a request whose worker was lost waits for another one.
        """
        self._workers = workers
        self._named = named
        self._hold_s = resume_s + NOTICE_S
        self._clock = clock
        self._retired: dict[Key, _Retired] = {}
        self._dropping: set[asyncio.Task[None]] = set()
        self._added = asyncio.Event()
        self._held_until = -math.inf

    def add(self, adapter: worker_pb2.Adapter) -> asyncio.Future[Freed]:
        """Retire a version the table no longer names. The returned future is done when all workers have freed it."""
        key = adapter.name, adapter.version
        if key not in self._retired:
            freed: asyncio.Future[Freed] = asyncio.get_running_loop().create_future()
            self._retired[key] = _Retired(adapter, self._clock(), freed)
            self._added.set()
        return self._retired[key].freed

    async def freed(self, adapter: worker_pb2.Adapter) -> Freed:
        """Retire a version, and return what was freed, or after `FREE_S` how many workers still hold it."""
        future = self.add(adapter)
        patience_s = GRACE_S + FREE_S
        if self._held_until - self._clock() < patience_s or adapter.digest in self._named():
            await asyncio.wait([future], timeout=patience_s)
        if future.done():
            return future.result()
        entry = self._retired.get((adapter.name, adapter.version))
        return Freed(num_draining=(entry.num_users if entry is not None else 0) or len(self._workers()))

    def worker_lost(self) -> None:
        """Free nothing for a while: a lost worker's requests are moving to others. Also called after a restart."""
        self._held_until = self._clock() + self._hold_s

    def needed(self) -> list[worker_pb2.Adapter]:
        """Return the versions in use by requests, which a restarted worker may get."""
        return [entry.adapter for entry in self._retired.values() if entry.is_used]

    async def run(self) -> None:
        """Ask the workers repeatedly while there are retired versions."""
        while True:
            self._added.clear()
            if not self._retired:
                await self._added.wait()
            await self.step()
            await asyncio.sleep(POLL_S)

    async def step(self) -> None:
        """Ask the workers once, and drop the versions without requests."""
        now = self._clock()
        due = {key: entry for key, entry in self._retired.items() if now - entry.since >= GRACE_S}
        workers = list(self._workers())
        asked = sorted({entry.adapter.digest for entry in due.values()})
        answers = await asyncio.gather(*(self._used(worker, asked) for worker in workers)) if asked else []
        named = self._named() if due else ()
        for key, entry in due.items():
            digest = entry.adapter.digest
            entry.num_users = sum(answer is None or digest in answer for answer in answers)
            entry.is_used = any(answer is not None and digest in answer for answer in answers)
            if digest in named or (not entry.num_users and self._clock() >= self._held_until):
                del self._retired[key]
                task = asyncio.create_task(self._drop(entry, workers), name=f"freeing {key[0]}")
                self._dropping.add(task)
                task.add_done_callback(self._dropping.discard)

    async def close(self) -> None:
        for task in self._dropping:
            task.cancel()
        await asyncio.gather(*self._dropping, return_exceptions=True)

    async def _used(self, worker: Worker, digests: Sequence[str]) -> set[str] | None:
        """Return those of `digests` that a worker's requests need; None if it does not answer."""
        try:
            return await worker.used(digests, self._hold_s)
        except grpc.aio.AioRpcError:
            return None

    async def _drop(self, entry: _Retired, workers: Sequence[Worker]) -> None:
        key = entry.adapter.name, entry.adapter.version
        replies = await asyncio.gather(*(worker.unregister(key, FREE_S) for worker in workers))
        if not entry.freed.done():
            entry.freed.set_result(
                Freed(
                    sum(reply.device_bytes for reply in replies if reply is not None),
                    sum(reply.host_bytes for reply in replies if reply is not None),
                    sum(reply is None for reply in replies),
                )
            )
