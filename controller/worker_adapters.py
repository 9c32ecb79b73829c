"""The adapters of one worker: what it has, what it lacks and why, and making them those of the fleet.

Owns: one worker's view, and trying again what failed, ever more rarely. Leaves to others: what is to be done
(reconcile.py), what names stand for (catalogue.py), what may go (retirement.py), the calls (worker_client.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import grpc.aio

from lorafleet.controller.catalogue import Catalogue
from lorafleet.controller.reconcile import AdapterActions, Key, reconcile_adapters
from lorafleet.controller.retirement import Retirement
from lorafleet.controller.worker_client import WorkerClient
from lorafleet.proto import controller_pb2, worker_pb2
from lorafleet.workers.errors import LoRAFleetError, status_of

logger = logging.getLogger(__name__)

MAX_LOADING = 8  # adapters that a worker is made to read at once
LOOK_S = 30.0  # between looks at what the worker has: what a call that failed has left behind
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0
PUBLISH_S = 0.5  # between tables that say what is still missing
FORGET_S = 5.0  # for what no request can name


@dataclass(slots=True)
class _Problem:
    """Why an adapter is not there."""

    reason: str  # a code
    num_tries: int
    retry_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetAdapters:
    """What all workers' adapters have in common."""

    catalogue: Catalogue
    retirement: Retirement
    staging: Collection[Key]  # versions that loads are just bringing
    changed: Callable[[], None]  # the table is another
    learned: Callable[[], None]  # and names stand for something else: all workers are to follow
    all_heard: Callable[[], bool]  # whether every worker is there and has said what names stand for
    tell: Callable[[str, int], None]


class WorkerAdapters:
    """Of one process. `follow` while it lives."""

    def __init__(
        self, name: str, client: WorkerClient, fleet: FleetAdapters, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.has_looked = False
        self.settled = asyncio.Event()  # all that it should have has been tried
        self._client = client
        self._fleet = fleet
        self._clock = clock
        self._registered: dict[Key, worker_pb2.Adapter] = {}
        self._noted: dict[str, int] = {}
        self._problems: dict[Key, _Problem] = {}
        self._missing: deque[worker_pb2.Adapter] = deque()  # to be loaded now
        self._loading: set[Key] = set()
        self._loaders: set[asyncio.Task[None]] = set()
        self._look_at = self._publish_at = -math.inf
        self._woken = asyncio.Event()

    async def look(self) -> None:
        """See what it has, and learn from it what names stand for. Raises `grpc.aio.AioRpcError`."""
        reply = await self._client.adapters()
        catalogue = self._fleet.catalogue
        before = self._registered.keys()
        self._registered = {(adapter.name, adapter.version): adapter for adapter in reply.adapters}
        self._noted = {adapter.name: adapter.version for adapter in reply.names}
        self.has_looked = True
        self._look_at = self._clock() + LOOK_S
        catalogue.see(version for _, version in self._registered)
        if catalogue.note(reply.names):
            self._fleet.learned()
        if self._registered.keys() != before and self.settled.is_set():  # an answer was lost, and is here now
            self._publish()

    def wake(self) -> None:
        """Something has changed: see to it now."""
        self._woken.set()

    def catch_up(self, newest: worker_pb2.Adapter) -> None:
        """A name stands for something else: see to it now, if it has not got or not heard of that."""
        if self._noted.get(newest.name) != newest.version or not (newest.unloaded or self._has(newest)):
            self.wake()

    async def follow(self) -> None:
        """Make its adapters the fleet's, for as long as it lives."""
        try:
            while True:
                self._woken.clear()
                try:
                    await self.step()
                except grpc.aio.AioRpcError:
                    pass  # silence is worker_life.py's business; the call is made again
                except Exception:  # a bug of ours must not leave the worker alone for good
                    logger.exception("the adapters of %s cannot be seen to", self.name)
                waits = [problem.retry_at for problem in self._problems.values()]
                wait_s = max(0.0, min([self._look_at, *waits]) - self._clock())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), wait_s if wait_s > 0 else FIRST_RETRY_S)
        finally:
            for task in self._loaders:
                task.cancel()
            await asyncio.gather(*self._loaders, return_exceptions=True)

    async def step(self) -> None:
        """Do once what is to be done, and begin to load what is missing. Raises `grpc.aio.AioRpcError`."""
        if self._clock() >= self._look_at:
            await self.look()
        actions = self._actions()
        if actions.note:
            await self.note(actions.note)
            actions = self._actions()  # meanwhile things may have changed
        for adapter in actions.retire:
            self._fleet.retirement.add(adapter)
        while actions.unregister:
            key = actions.unregister[0]
            await self.unregister(key, FORGET_S)
            if key in self._registered:
                break  # the worker does not answer; it is tried again
            actions = self._actions()
        self._begin_loads(actions.register)
        if not self._loaders and not self.settled.is_set():
            self.settled.set()
            self._publish()

    def lacking(self) -> list[controller_pb2.LackingAdapter]:
        """Of the adapters that names stand for, those whose content is not here."""
        held = {adapter.digest for adapter in self._registered.values()}
        return [
            controller_pb2.LackingAdapter(
                name=adapter.name,
                digest=adapter.digest,
                reason=self._reason(adapter),
            )
            for adapter in self._fleet.catalogue.adapters()
            if adapter.digest not in held
        ]

    async def note(self, adapters: Iterable[worker_pb2.Adapter]) -> None:
        """Tell it what names stand for. Raises `grpc.aio.AioRpcError`."""
        adapters = list(adapters)
        await self._client.note(adapters)
        for adapter in adapters:
            self._noted[adapter.name] = max(adapter.version, self._noted.get(adapter.name, 0))

    async def register(self, adapter: worker_pb2.Adapter) -> worker_pb2.Adapter:
        """Have it read an adapter; as it was found. Raises `LoRAFleetError` and `grpc.aio.AioRpcError`."""
        found = await self._client.register(adapter)
        self._registered[adapter.name, adapter.version] = found
        return found

    async def used(self, digests: Sequence[str], cut_s: float) -> set[str]:
        """Which of these its requests need. Raises `grpc.aio.AioRpcError`."""
        return await self._client.used(digests, cut_s)

    async def unregister(self, key: Key, timeout_s: float) -> worker_pb2.UnregisterAdapterReply | None:
        """Have it forget a version and free it. None: it is not done yet, though no request may name it now.

        A worker that is lost has nothing to free.
        """
        try:
            reply = await self._client.unregister(*key, timeout_s)
        except grpc.aio.AioRpcError as error:
            self._look_at = -math.inf  # it may have it still
            self.wake()
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return None
            return worker_pb2.UnregisterAdapterReply()
        self._registered.pop(key, None)
        return reply

    def _actions(self) -> AdapterActions:
        fleet = self._fleet
        return reconcile_adapters(
            {adapter.name: adapter for adapter in fleet.catalogue.names.all()},
            fleet.retirement.needed(),
            self._registered,
            self._noted,
            staging=fleet.staging,
            all_heard=fleet.all_heard(),
        )

    def _has(self, adapter: worker_pb2.Adapter) -> bool:
        found = self._registered.get((adapter.name, adapter.version))
        return found is not None and found.digest == adapter.digest

    def _reason(self, adapter: worker_pb2.Adapter) -> str:
        problem = self._problems.get((adapter.name, adapter.version))
        return "" if problem is None else problem.reason

    def _begin_loads(self, missing: Sequence[worker_pb2.Adapter]) -> None:
        """Those that were tried least come first, so that one which hangs or fails holds up no other for long."""
        now = self._clock()
        tries: dict[Key, int] = {}
        due = []
        for adapter in missing:
            key = adapter.name, adapter.version
            problem = self._problems.get(key)
            tries[key] = problem.num_tries if problem is not None else 0
            if key not in self._loading and (problem is None or problem.retry_at <= now):
                due.append(adapter)
        for key in self._problems.keys() - tries.keys():
            del self._problems[key]
        self._missing = deque(sorted(due, key=lambda adapter: tries[adapter.name, adapter.version]))
        for _ in range(min(len(due), MAX_LOADING - len(self._loaders))):
            task = asyncio.create_task(self._load_missing(), name=f"adapters of {self.name}")
            self._loaders.add(task)
            task.add_done_callback(self._loader_ended)

    def _loader_ended(self, task: asyncio.Task[None]) -> None:
        self._loaders.discard(task)
        self.wake()

    async def _load_missing(self) -> None:
        while self._missing:
            adapter = self._missing.popleft()
            key = adapter.name, adapter.version
            self._loading.add(key)
            try:
                await self._load(key, adapter)
            finally:
                self._loading.discard(key)
            if not self._missing or self._clock() >= self._publish_at:  # not after each of thousands
                self._publish()

    async def _load(self, key: Key, adapter: worker_pb2.Adapter) -> None:
        try:
            await self.register(adapter)
        except LoRAFleetError as error:
            self._failed(key, getattr(error, "reason", "") or status_of(error).code, error.message)
        except grpc.aio.AioRpcError as error:
            self._failed(key, "no_answer", f"the worker does not answer ({error.code().name})")
        except Exception as error:  # else the others would not be loaded either
            logger.exception("adapter %s cannot be loaded again", key[0])
            self._failed(key, status_of(error).code, repr(error))
        else:
            self._problems.pop(key, None)

    def _failed(self, key: Key, reason: str, why: str) -> None:
        known = self._problems.get(key)
        if known is None or known.reason != reason:
            self._fleet.tell(f"{self.name} cannot have adapter {key[0]}: {why}", logging.ERROR)
        num_tries = 1 if known is None else known.num_tries + 1
        wait_s = min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(num_tries - 1, 30))
        self._problems[key] = _Problem(reason, num_tries, self._clock() + wait_s)

    def _publish(self) -> None:
        self._publish_at = self._clock() + PUBLISH_S
        self._fleet.catalogue.lacking_changed()
        self._fleet.changed()
