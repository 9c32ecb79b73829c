"""The controller as a Ray actor: keeps the wanted workers running, follows their health, publishes the routing table.

Named and detached; when Ray restarts it, it rebuilds everything from its constructor's arguments and from the workers,
which go on serving meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from lorafleet.controller.adapters import AdapterUpdates
from lorafleet.controller.catalogue import Catalogue
from lorafleet.controller.cluster import WORKER_PREFIX, FleetImpossible, WorkerCluster, WorkerLost
from lorafleet.controller.config import ServeConfig
from lorafleet.controller.reconcile import reconcile
from lorafleet.controller.service import ControllerService, read_tokenizer_files
from lorafleet.controller.worker_client import WorkerClient
from lorafleet.proto.controller_pb2_grpc import add_ControllerServicer_to_server
from lorafleet.workers.actor import WorkerFailed, WorkerReady
from lorafleet.workers.errors import ERRORS, AdapterRefusedError, ConfigError, LoRAFleetError, status_of
from lorafleet.workers.rpc import create_server
from lorafleet.workers.text.files import files_digest

logger = logging.getLogger(__name__)

POLL_S = 1.0
LOST_S = 5.0  # a worker that has not answered for so long is taken out of the table
START_TIMEOUT_S = 600.0
RETRY_S = 1.0
RESTART_S = 10.0  # between attempts of a worker that cannot start, such as one whose files are away
RESYNC_S = 30.0  # between attempts to load an adapter again that a restarted worker could not read
_REFUSED = ERRORS[AdapterRefusedError].code


@dataclass(frozen=True, slots=True)
class FleetReady:
    """All wanted workers serve."""

    workers: tuple[WorkerReady, ...]


class ControllerActor:
    """One fleet. All arguments are plain data, since Ray keeps them for restarts."""

    def __init__(self, config: ServeConfig, host: str, port: int, token: str) -> None:
        logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
        self._config = config
        self._host = host
        self._port = port
        self._token = token
        self._cluster = WorkerCluster()
        self._desired = [f"{WORKER_PREFIX}{number}" for number in range(config.num_workers)]
        self._ready: dict[str, WorkerReady] = {}
        self._clients: dict[str, WorkerClient] = {}  # of the workers in the table
        self._bare: set[str] = set()  # workers that are made without the start-up's adapters
        self._failed: WorkerFailed | None = None
        self._settled = asyncio.Event()  # all wanted workers serve, or one cannot
        self._run = asyncio.get_running_loop().create_task(self._start())
        self._run.add_done_callback(self._stopped)

    async def ready(self) -> FleetReady | WorkerFailed:
        """Wait until the whole fleet serves or cannot."""
        waiter = asyncio.ensure_future(self._settled.wait())
        await asyncio.wait([waiter, self._run], return_when=asyncio.FIRST_COMPLETED)
        if not waiter.done():
            waiter.cancel()
            self._run.result()  # the start failed by a bug: raise it to the caller
        if self._failed is not None:
            return self._failed
        return FleetReady(tuple(self._ready[name] for name in self._desired))

    async def drain(self, timeout_s: float) -> None:
        """Let every worker refuse new requests and finish its running ones."""
        await asyncio.gather(
            *(self._drain_worker(worker, timeout_s) for worker in self._ready.values()), return_exceptions=True
        )

    async def _start(self) -> None:
        try:
            files = read_tokenizer_files(Path(self._config.engine.model))
        except LoRAFleetError as error:
            self._fail(WorkerFailed(status_of(error).code, error.message))
            return
        digest = files_digest(files)
        self._catalogue = Catalogue(
            names=self._config.served_model_names,
            root=self._config.engine.model,
            tokenizer_digest=digest,
            created=int(time.time()),
        )
        self._updates = AdapterUpdates(
            self._catalogue,
            self._clients.values,
            lambda: self._service.changed(),
            allowed=self._config.allow_runtime_lora_updates,
            roots=self._config.lora_roots,
        )
        self._service = ControllerService(self._catalogue, {digest: files}, self._updates)
        self._server = create_server(self._token)
        add_ControllerServicer_to_server(self._service, self._server)
        self._server.add_insecure_port(f"{self._host}:{self._port}")
        await self._server.start()
        actions = reconcile(self._desired, await asyncio.to_thread(self._cluster.worker_names))
        for name in actions.remove:
            await asyncio.to_thread(self._cluster.remove_worker, name)
        await asyncio.gather(*(self._create(name) for name in actions.create))
        await asyncio.gather(*(self._follow(name) for name in self._desired))

    async def _follow(self, name: str) -> None:
        """Keep the table true about one worker, through all its restarts."""
        while True:
            try:
                worker = await self._cluster.worker_ready(name, START_TIMEOUT_S)
            except WorkerLost as lost:
                logger.warning("worker lost: %s", lost)
                await asyncio.sleep(RETRY_S)
                await self._create(name)
                continue
            if isinstance(worker, WorkerFailed):
                logger.error("worker %s cannot start: %s", name, worker.message)
                self._fail(worker)
                if self._failed is None and worker.code == _REFUSED and name not in self._bare:
                    # An adapter of the start-up has gone or changed since. That must not keep the others from serving.
                    self._bare.add(name)
                    await asyncio.to_thread(self._cluster.remove_worker, name)
                    await self._create(name)
                else:
                    await asyncio.sleep(RESTART_S)
                    await asyncio.to_thread(self._cluster.restart_worker, name)
                continue
            logger.info(
                "worker %s is %s, generation %d, at %s", name, worker.worker_id, worker.generation, worker.address
            )
            self._ready[name] = worker
            if len(self._ready) == len(self._desired):
                self._settled.set()
            async with WorkerClient(worker.address, self._token) as client:
                await self._poll_until_lost(name, worker, client)
            logger.warning(
                "worker %s (%s) does not answer; it takes no requests until it is back", name, worker.worker_id
            )
            self._clients.pop(name, None)
            if self._catalogue.drop_worker(worker.worker_id):
                self._service.changed()

    async def _poll_until_lost(self, name: str, worker: WorkerReady, client: WorkerClient) -> None:
        """Publish the worker once it knows the fleet's adapters, and follow its state. Returns when it is lost."""
        last_answer = time.monotonic()
        sync_at = last_answer
        while True:
            try:
                report = await client.report()
                if (report.worker_id, report.generation) != (worker.worker_id, worker.generation):
                    return
                if time.monotonic() >= sync_at:
                    failed = await self._updates.sync(client)
                    sync_at = time.monotonic() + RESYNC_S if failed else math.inf
            except grpc.aio.AioRpcError as error:
                # A refused connection is a dead process; silence may be a busy machine.
                if error.code() is grpc.StatusCode.UNAVAILABLE or time.monotonic() - last_answer > LOST_S:
                    return
            else:
                last_answer = time.monotonic()
                self._clients[name] = client
                if self._catalogue.put_worker(worker, report.state):
                    self._service.changed()
            await asyncio.sleep(POLL_S)

    async def _drain_worker(self, worker: WorkerReady, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        async with WorkerClient(worker.address, self._token) as client:
            while time.monotonic() < deadline:
                if not await client.drain():
                    return
                await asyncio.sleep(0.05)

    async def _create(self, name: str) -> None:
        config = self._config
        try:
            await asyncio.to_thread(
                self._cluster.create_worker,
                name,
                config.engine,
                config.num_workers,
                () if name in self._bare else config.adapters,
                self._host,
                self._token,
                config.log_level,
            )
        except FleetImpossible as error:
            logger.error("%s", error)
            self._fail(WorkerFailed(ERRORS[ConfigError].code, str(error)))
        except WorkerLost as lost:  # tried again when it is missed
            logger.warning("%s", lost)

    def _fail(self, failure: WorkerFailed) -> None:
        """The fleet cannot start. Of no consequence later on, when the worker is tried again until it can."""
        if not self._settled.is_set():
            self._failed = failure
            self._settled.set()

    def _stopped(self, run: asyncio.Task[None]) -> None:
        """Nobody looks after the fleet now. While it starts, `ready` says so; later Ray starts the controller anew."""
        if not run.cancelled() and self._settled.is_set() and self._failed is None:
            logger.critical("the controller ends", exc_info=run.exception())
            os._exit(1)
