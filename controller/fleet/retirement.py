"""Versions of adapters that no name stands for any more, kept on all workers for as long as any request may need them.

A request that has begun ends with the version that it began with, and when its worker dies it goes on with another one,
which must still have that version. So a version goes from all workers together: when no worker has a request for it,
and no worker was lost of late whose requests may just be on their way. Leaves to others: what names stand for
(catalogue.py), the calls (worker_client.py).
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

GRACE_S = 2.0  # between a new table and the end of what it no longer names: requests that gateways have just resolved
POLL_S = 0.5
FREE_S = 30.0  # that a worker may take to free what no request needs
NOTICE_S = 5.0  # in which gateways see that a worker is gone


@dataclass(frozen=True, slots=True)
class Freed:
    """What an unload has given back, on all workers together."""

    device_bytes: int = 0
    host_bytes: int = 0
    num_draining: int = 0  # workers that still finish requests, and free later


class Worker(Protocol):
    """What is asked of worker_adapters.py's `WorkerAdapters`."""

    async def used(self, digests: Sequence[str], cut_s: float) -> set[str]: ...
    async def unregister(self, key: Key, timeout_s: float) -> worker_pb2.UnregisterAdapterReply | None: ...


@dataclass(slots=True, eq=False)
class _Retired:
    adapter: worker_pb2.Adapter
    since: float
    freed: asyncio.Future[Freed]
    num_users: int = 0  # workers with requests that need it, or that did not say, when they were last asked
    is_used: bool = False


class Retirement:
    """`add` a version; `run` until the controller ends."""

    def __init__(
        self,
        workers: Callable[[], Collection[Worker]],
        named: Callable[[], Collection[str]],
        *,
        resume_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """workers: those in the table. named: digests that names stand for; nothing of these is freed.

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
        """Nothing stands for it in the table now. Its future is done when all workers have freed it."""
        key = adapter.name, adapter.version
        if key not in self._retired:
            freed: asyncio.Future[Freed] = asyncio.get_running_loop().create_future()
            self._retired[key] = _Retired(adapter, self._clock(), freed)
            self._added.set()
        return self._retired[key].freed

    async def freed(self, adapter: worker_pb2.Adapter) -> Freed:
        """`add` it, and what has become of it after `FREE_S` at the latest."""
        future = self.add(adapter)
        patience_s = GRACE_S + FREE_S
        if self._held_until - self._clock() < patience_s or adapter.digest in self._named():
            await asyncio.wait([future], timeout=patience_s)
        if future.done():
            return future.result()
        entry = self._retired.get((adapter.name, adapter.version))
        return Freed(num_draining=(entry.num_users if entry is not None else 0) or len(self._workers()))

    def worker_lost(self) -> None:
        """Its requests are on their way to other workers. A controller that starts does not know whether one was."""
        self._held_until = self._clock() + self._hold_s

    def needed(self) -> list[worker_pb2.Adapter]:
        """Those that a request was seen to use: a worker that has restarted may get it."""
        return [entry.adapter for entry in self._retired.values() if entry.is_used]

    def keys(self) -> Collection[Key]:
        return self._retired.keys()

    async def run(self) -> None:
        """Ask the workers, again and again, while there is something to ask for."""
        while True:
            self._added.clear()
            if not self._retired:
                await self._added.wait()
            await self.step()
            await asyncio.sleep(POLL_S)

    async def step(self) -> None:
        """Ask the workers once, and drop what nobody needs."""
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
        """None: it does not say."""
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
