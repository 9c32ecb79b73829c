"""One wanted worker, through all its processes: made, in the table while it answers, replaced when it is lost.

Owns: following it, its restarts, what is known of it. Leaves to others: Ray (cluster.py), the table (catalogue.py),
which adapters it is to know (adapters.py), which workers are wanted (actor.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import grpc

from lorafleet.controller.catalogue import Catalogue
from lorafleet.controller.cluster import WorkerLost
from lorafleet.controller.worker_adapters import FleetAdapters, WorkerAdapters
from lorafleet.controller.worker_client import CALL_S, WorkerClient
from lorafleet.proto import controller_pb2, worker_pb2
from lorafleet.workers.actor import WorkerFailed, WorkerReady
from lorafleet.workers.errors import ERRORS, AdapterRefusedError

logger = logging.getLogger(__name__)

POLL_S = 1.0
LOST_S = 5.0  # a worker that has not answered for so long is taken out of the table
ENDED_S = 15.0  # and after so long it is ended, if it has not ended by itself
START_TIMEOUT_S = 600.0
RETRY_S = 1.0
RESTART_S = 10.0  # between attempts of a worker that cannot start, such as one whose files are away
SETTLE_S = 10.0  # that a worker stays out of the table while it loads the fleet's adapters; the rest it loads later
_REFUSED = ERRORS[AdapterRefusedError].code


class Cluster(Protocol):
    """What is asked of cluster.py's `WorkerCluster`."""

    async def worker_ready(self, name: str, timeout_s: float) -> WorkerReady | WorkerFailed: ...
    def remove_worker(self, name: str) -> None: ...
    def restart_worker(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all workers of a fleet have in common."""

    cluster: Cluster
    catalogue: Catalogue
    adapters: FleetAdapters
    token: str
    table_changed: Callable[[], None]
    tell: Callable[[str, int], None]  # an event's line and log level
    create: Callable[[str, bool], Awaitable[None]]  # (name, whether without the start-up's adapters)
    started: Callable[[], None]  # a worker is in the table
    cannot_start: Callable[[WorkerFailed], bool]  # whether that is the end, since the fleet has never served


class WorkerLife:
    """`follow` it for as long as it is wanted."""

    def __init__(self, name: str, num_ranks: int, surroundings: Surroundings) -> None:
        self.name = name
        self.ready: WorkerReady | None = None  # as it last started
        self.client: WorkerClient | None = None  # while it is in the table
        self.adapters: WorkerAdapters | None = None  # of its process, when it has said what it has
        self.has_served = False
        self._num_ranks = num_ranks
        self._surroundings = surroundings
        self._report: worker_pb2.WorkerReport | None = None
        self._answered_at = 0.0
        self._num_starts = 0
        self._is_bare = False  # made without the start-up's adapters
        self._entered = asyncio.Event()  # set, and replaced, when it enters the table

    async def follow(self) -> None:
        """Keep it there and the table true about it."""
        cluster = self._surroundings.cluster
        while True:
            try:
                worker = await cluster.worker_ready(self.name, START_TIMEOUT_S)
            except WorkerLost as lost:
                logger.warning("worker %s is not there: %s", self.name, lost)
                self._heard()
                await asyncio.sleep(RETRY_S)
                await self._surroundings.create(self.name, self._is_bare)
                continue
            if isinstance(worker, WorkerFailed):
                await self._start_again(worker)
                continue
            if worker != self.ready:  # else it could not be reached for a moment
                self._num_starts += 1
                self._tell(f"is {worker.worker_id}, generation {worker.generation}, at {worker.address}")
            self.ready = worker
            async with WorkerClient(worker.address, self._surroundings.token) as client:
                adapters = WorkerAdapters(self.name, client, self._surroundings.adapters)
                following = asyncio.create_task(adapters.follow(), name=f"adapters of {self.name}")
                try:
                    why = await self._poll_until_lost(worker, client, adapters)
                finally:
                    self._leave_table(worker)
                    self.adapters = self._report = None
                    following.cancel()
                    await asyncio.gather(following, return_exceptions=True)
            if adapters.has_looked:
                self._heard()
            self._tell(f"is lost ({worker.worker_id}, generation {worker.generation}): {why}", logging.WARNING)

    async def drain(self, timeout_s: float) -> bool:
        """Let it refuse new requests and finish its running ones, for at most so long; whether it has."""
        if self.ready is None:
            return True
        self._tell(f"drains, for at most {timeout_s:g} s")
        deadline = time.monotonic() + timeout_s
        try:
            async with WorkerClient(self.ready.address, self._surroundings.token) as client:
                while num_left := await client.drain():
                    if time.monotonic() >= deadline:
                        self._tell(f"still has {num_left} requests; others go on with them", logging.WARNING)
                        return False
                    await asyncio.sleep(0.05)
        except grpc.aio.AioRpcError as error:  # it is gone already, or hangs
            self._tell(f"does not drain: {error.details()}", logging.WARNING)
            return False
        self._tell("is drained")
        return True

    async def restart(self, drain_timeout_s: float) -> None:
        """Drain it, end it, and wait until its next self is in the table. Raises `TimeoutError`."""
        entered = self._entered
        await self.drain(drain_timeout_s)
        await asyncio.to_thread(self._surroundings.cluster.restart_worker, self.name)
        async with asyncio.timeout(START_TIMEOUT_S):
            await entered.wait()

    def status(self) -> controller_pb2.WorkerStatus:
        """What is known of it now."""
        status = controller_pb2.WorkerStatus(
            name=self.name, num_ranks=self._num_ranks, num_starts=self._num_starts, state="starting"
        )
        if self.ready is not None and self._report is not None:
            status.state = "draining" if self._report.state == worker_pb2.WORKER_DRAINING else "ready"
            if self.client is None:
                status.state = "silent"
            status.report.CopyFrom(self._report)
            status.report_age_s = time.monotonic() - self._answered_at
            status.max_num_seqs, status.max_loras = self.ready.max_num_seqs, self.ready.max_loras
        if self.adapters is not None:
            status.lacking.extend(self.adapters.lacking())
        return status

    def _tell(self, what: str, level: int = logging.INFO) -> None:
        self._surroundings.tell(f"{self.name} {what}", level)

    async def _start_again(self, failed: WorkerFailed) -> None:
        """One that cannot start is tried again until it can, unless the fleet has never served."""
        cluster = self._surroundings.cluster
        self._heard()
        self._tell(f"cannot start: {failed.message}", logging.ERROR)
        is_final = self._surroundings.cannot_start(failed)
        if not is_final and failed.code == _REFUSED and not self._is_bare:
            # An adapter of the start-up has gone or changed since. That must not keep the others from serving.
            self._is_bare = True
            await self._ask_ray(cluster.remove_worker)
            await self._surroundings.create(self.name, self._is_bare)
        else:
            await asyncio.sleep(RESTART_S)
            await self._ask_ray(cluster.restart_worker)

    async def _ask_ray(self, call: Callable[[str], None]) -> None:
        """One that fails, since Ray does not answer now, is made again: the worker is looked at from the beginning."""
        try:
            await asyncio.to_thread(call, self.name)
        except WorkerLost as lost:
            logger.warning("%s", lost)

    async def _poll_until_lost(self, worker: WorkerReady, client: WorkerClient, adapters: WorkerAdapters) -> str:
        """Publish it once it knows the fleet's adapters, and follow its state; why it is lost, for people."""
        self._answered_at = began = looked_at = time.monotonic()
        silent_s = 0.0  # by our own running time: after a pause of the controller or the machine nobody is to blame
        while True:
            looked_at, silent_s = self._silence(looked_at, silent_s)
            try:
                report = await client.report()
                if (report.worker_id, report.generation) != _identity(worker):
                    return "another one answers at its address"
            except grpc.aio.AioRpcError as error:
                # A refused connection is a dead process; silence may be a busy machine.
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return "its process has ended"
                looked_at, silent_s = self._silence(looked_at, silent_s)
                if silent_s > ENDED_S:
                    # It hangs or is stopped. Ray ends within 5 s what does not end by itself.
                    await self._ask_ray(self._surroundings.cluster.restart_worker)
                    return f"it has given no report for {silent_s:.0f} s ({_reason(error)}), so its process is ended"
                if silent_s > LOST_S and self._leave_table(worker):
                    self._tell(
                        f"has given no report for {silent_s:.0f} s ({_reason(error)}); it gets no requests",
                        logging.WARNING,
                    )
            else:
                self._answered_at, self._report, silent_s = time.monotonic(), report, 0.0
                if adapters.has_looked:
                    self.adapters = adapters
                    self._heard()
                    if adapters.settled.is_set() or time.monotonic() - began > SETTLE_S:
                        self._enter_table(worker, client, report.state, adapters)
            if self.client is not None or adapters.settled.is_set():
                await asyncio.sleep(POLL_S)
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(adapters.settled.wait(), POLL_S)

    def _heard(self) -> None:
        """What it knows of adapters is known, or is lost with it."""
        if self._surroundings.catalogue.heard(self.name):
            self._surroundings.table_changed()

    @staticmethod
    def _silence(looked_at: float, silent_s: float) -> tuple[float, float]:
        """Now, and the silence until now; both of the last look."""
        now = time.monotonic()
        return now, silent_s + min(now - looked_at, CALL_S + POLL_S)

    def _enter_table(
        self, worker: WorkerReady, client: WorkerClient, state: worker_pb2.WorkerState, adapters: WorkerAdapters
    ) -> None:
        is_new = self.client is None
        self.client = client
        if self._surroundings.catalogue.put_worker(worker, state, adapters.lacking):
            self._surroundings.table_changed()
        if is_new:
            adapters.wake()
            self._tell("gets requests")
            self.has_served = True
            self._surroundings.started()
            self._entered.set()
            self._entered = asyncio.Event()

    def _leave_table(self, worker: WorkerReady) -> bool:
        """Whether it was in it."""
        self.client = None
        if not self._surroundings.catalogue.drop_worker(worker.worker_id):
            return False
        self._surroundings.adapters.retirement.worker_lost()
        self._surroundings.table_changed()
        return True


def _reason(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"


def _identity(worker: WorkerReady) -> tuple[str, int]:
    return worker.worker_id, worker.generation
