"""The controller as a Ray actor: it keeps the wanted workers running and publishes the routing table.

The actor is named and detached. When Ray restarts it, it rebuilds its state from its constructor's arguments and from
the workers, which keep serving meanwhile. A controller that fails exits, one that hangs is killed by its watchdog, and
Ray starts it again. Until the fleet has served for the first time, `ready` returns its failures.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from lorafleet.controller.config import GatewayNodes, ServeConfig
from lorafleet.controller.fleet.adapters import AdapterUpdates
from lorafleet.controller.fleet.catalogue import Catalogue
from lorafleet.controller.fleet.cluster import WORKER_PREFIX, WorkerCluster, WorkerLost
from lorafleet.controller.fleet.events import Events
from lorafleet.controller.fleet.gateway_placement import GatewayPlacement
from lorafleet.controller.fleet.owner import owner_has_ended
from lorafleet.controller.fleet.reconcile import reconcile
from lorafleet.controller.fleet.retirement import Retirement
from lorafleet.controller.fleet.service import ControllerService, read_tokenizer_files
from lorafleet.controller.fleet.watchdog import under_watch
from lorafleet.controller.fleet.worker_adapters import FleetAdapters, WorkerAdapters
from lorafleet.controller.fleet.worker_life import Surroundings, WorkerLife
from lorafleet.proto.controller_pb2_grpc import add_ControllerServicer_to_server
from lorafleet.workers.errors import ERRORS, ConfigError, InternalError, LoRAFleetError, NoRoomError, status_of
from lorafleet.workers.rpc import create_server
from lorafleet.workers.server.actor import FleetSettings, WorkerFailed, WorkerReady
from lorafleet.workers.text.files import files_digest

logger = logging.getLogger(__name__)

GATEWAYS_S = 30.0  # by then every gateway has found a restarted controller
HEAR_S = 10.0  # how long a restarted controller waits for its workers' adapter names before it publishes without them
AGAIN_S = 2.0  # between attempts, and from a failure to the exit, so that readers of the events still see it
FIRST_AGAIN_S = 60.0  # the same before the fleet has served: the command that started it is to end it


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a command."""

    succeeded: bool
    text: str  # to be printed


@dataclass(frozen=True, slots=True)
class FleetReady:
    """All wanted workers serve, and all wanted gateways listen."""

    workers: tuple[WorkerReady, ...]
    last_event: int  # number of the newest event so far
    controller: str  # host:port
    gateway_nodes: tuple[str, ...] = ()  # addresses of the nodes whose gateways belong to the fleet


class ControllerActor:
    """The controller of one fleet. All arguments are plain data, since Ray keeps them for restarts."""

    def __init__(
        self,
        config: ServeConfig,
        host: str,
        port: int,
        token: str,
        *,
        gateways_on: GatewayNodes = "none",
        owner: str = "",
    ) -> None:
        """host: to listen on; empty: the node's address. owner: the mark of the command the fleet ends with, if any."""
        logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
        self._config = config
        self._port = port
        self._token = token
        self._cluster = WorkerCluster()
        self._host = host or self._cluster.node_address()
        self._gateways_on = gateways_on
        self._owner = owner
        self._desired = [f"{WORKER_PREFIX}{number}" for number in range(config.num_workers)]
        self._lives: dict[str, WorkerLife] = {}
        self._events = Events()
        self._failed: WorkerFailed | None = None  # why the fleet, which has never served, cannot start
        self._has_served = False
        self._last_failure = ""  # the last one reported
        self._lacks_room = False
        self._began_at = time.monotonic()
        self._gateways = GatewayPlacement(
            self._cluster, gateways_on, config, controller=f"{self._host}:{port}", token=token, tell=self._events.add
        )
        self._gateways_started = False
        self._restart = asyncio.Lock()  # held by the one restart of all workers
        self._settled = asyncio.Event()  # all wanted workers serve and gateways listen, or one cannot
        # Nothing here waits for Ray, which does not restart an actor whose constructor has failed.
        self._run = asyncio.get_running_loop().create_task(self._serve())
        self._run.add_done_callback(self._stopped)
        self._watched = asyncio.get_running_loop().create_task(under_watch())

    async def ready(self) -> FleetReady | WorkerFailed:
        """Wait until the whole fleet serves, or has failed to start."""
        await self._settled.wait()
        if self._failed is not None:
            return self._failed
        workers = tuple(life.ready for life in self._lives.values() if life.ready is not None)
        return FleetReady(workers, self._events.last, f"{self._host}:{self._port}", tuple(self._gateways.addresses))

    async def was_told(self, config: ServeConfig, token: str, gateways_on: GatewayNodes) -> bool:
        """Return whether this controller was started with these arguments."""
        told = config == self._config and gateways_on == self._gateways_on and not self._owner
        return told and hmac.compare_digest(token, self._token)

    async def events(self, after: int) -> list[tuple[int, str]]:
        """Return the events after the one numbered `after`; wait a while if there are none."""
        return await self._events.after(after)

    async def restart_workers(self) -> Outcome:
        """Replace the workers' processes one after the other, so that requests always find a serving worker.

        Drained nodes get their gateways back. A second restart waits for the first.
        """
        async with self._restart:
            self._gateways.undrain()
            for life in self._lives.values():
                try:
                    await life.restart(self._config.drain_timeout_s)
                except (TimeoutError, WorkerLost):
                    return Outcome(False, f"{life.name} did not restart; the other workers were not restarted")
            return Outcome(True, f"all {len(self._lives)} workers were restarted")

    async def drain_node(self, node_id: str, timeout_s: float) -> Outcome:
        """Drain a node's gateways and the workers with a rank on it: they finish their requests and take no others."""
        lives = list(self._lives.values())
        nodes = await asyncio.gather(*(asyncio.to_thread(self._cluster.nodes_of, life.name) for life in lives))
        concerned = [life for life, on in zip(lives, nodes, strict=True) if node_id in on]
        _, *drained = await asyncio.gather(
            self._gateways.drain(node_id, timeout_s), *(life.drain(timeout_s) for life in concerned)
        )
        if not concerned:
            return Outcome(True, "no worker is on this node")
        names = ", ".join(life.name for life in concerned)
        if all(drained):
            return Outcome(True, f"drained: {names}")
        return Outcome(False, f"not all of {names} drained within {timeout_s:g} s; other workers resume their requests")

    async def _serve(self) -> None:
        """Run the fleet, if it has an owner until that has ended."""
        if not self._owner:
            await self._start()
            return
        serving = asyncio.ensure_future(self._start())
        ended = asyncio.ensure_future(
            owner_has_ended(self._cluster, self._owner, self._config.drain_timeout_s, self._events.add)
        )
        try:
            await asyncio.wait([serving, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            serving.cancel()
            ended.cancel()  # has no effect on the one that is done
        await (serving if serving.done() else ended)
        await asyncio.gather(serving, return_exceptions=True)  # else it would create again what `end_fleet` ends
        await asyncio.to_thread(self._cluster.end_fleet)

    async def _start(self) -> None:
        if await asyncio.to_thread(self._cluster.is_restarted):
            self._has_served = True  # so `ready` reports no start-up failure
            self._events.number_from(int(time.time() * 1000))
            self._events.add("the controller was started again; it looks for its workers", logging.WARNING)
        files = await self._files()
        digest = files_digest(files)
        self._catalogue = Catalogue(
            names=self._config.served_model_names,
            root=self._config.engine.model,
            tokenizer_digest=digest,
            created=int(time.time()),
            now_ms=lambda: time.time_ns() // 1_000_000,
            fleet=self._cluster.fleet_id(),
            of_start=[adapter.name for adapter in self._config.adapters],
        )
        self._retirement = Retirement(
            self._workers_in_table, self._catalogue.digests, resume_s=self._config.worker_wait_s
        )
        self._updates = AdapterUpdates(
            self._catalogue,
            self._retirement,
            self._workers_in_table,
            lambda: self._service.changed(),
            allowed=self._config.allow_runtime_lora_updates,
            roots=self._config.lora_roots,
            tell=self._events.add,
        )
        self._service = ControllerService(
            self._catalogue,
            {digest: files},
            self._updates,
            workers=lambda: [life.status() for life in self._lives.values()],
            clients=lambda: [life.client for life in self._lives.values() if life.client is not None],
            learned=self._learned,
        )
        surroundings = Surroundings(
            cluster=self._cluster,
            catalogue=self._catalogue,
            adapters=FleetAdapters(
                catalogue=self._catalogue,
                retirement=self._retirement,
                staging=self._updates.staging,
                changed=self._service.changed,
                learned=self._learned,
                all_heard=self._all_heard,
                tell=self._events.add,
            ),
            token=self._token,
            table_changed=self._service.changed,
            tell=self._events.add,
            create=self._create,
            started=self._started,
            cannot_start=self._cannot_start,
        )
        num_ranks = self._config.engine.tensor_parallel_size
        self._lives = {name: WorkerLife(name, num_ranks, surroundings) for name in self._desired}
        observed = await asyncio.to_thread(self._cluster.worker_names)
        actions = reconcile(self._desired, observed)
        if observed:  # left by an earlier run of this controller
            self._retirement.worker_lost()
            self._catalogue.await_word(set(self._desired) & set(observed))
            asyncio.get_running_loop().call_later(HEAR_S, self._heard_enough)
        self._server = create_server(self._token)
        add_ControllerServicer_to_server(self._service, self._server)
        await self._listen()
        for name in actions.remove:
            await asyncio.to_thread(self._cluster.remove_worker, name)
        await asyncio.gather(*(self._create(name) for name in actions.create))
        while self._lacks_room and not self._has_served:  # gateways started now would only hold their port
            await asyncio.sleep(AGAIN_S)
            self._lacks_room = False
            await asyncio.gather(*(self._create(name) for name in self._desired))
        await asyncio.gather(
            self._retirement.run(),
            self._gateways.follow(self._gateways_are_there),
            *(life.follow() for life in self._lives.values()),
        )

    async def _files(self) -> dict[str, bytes]:
        """Return the base model's tokenizer files; try until they can be read."""
        while True:
            try:
                return await asyncio.to_thread(read_tokenizer_files, Path(self._config.engine.model))
            except LoRAFleetError as error:
                self._tell_failure(WorkerFailed(status_of(error).code, error.message))
            await asyncio.sleep(AGAIN_S)

    async def _listen(self) -> None:
        address = f"{self._host}:{self._port}"
        while True:
            try:
                self._server.add_insecure_port(address)
                break
            except RuntimeError:  # after a restart the port may be in use for a while
                message = (
                    f"The controller cannot listen on {address}, on the cluster's head node: the port is taken, or the "
                    "address is another machine's."
                )
                self._tell_failure(WorkerFailed(ERRORS[ConfigError].code, message))
            await asyncio.sleep(AGAIN_S)
        await self._server.start()

    async def _create(self, name: str, is_bare: bool = False) -> None:
        config = self._config
        try:
            await asyncio.to_thread(
                self._cluster.create_worker,
                name,
                config.engine,
                config.num_workers,
                () if is_bare else config.adapters,
                FleetSettings(self._host, self._token, config.log_level, config.hung_step_s, config.worker_ports),
            )
        except NoRoomError as error:
            self._lacks_room = True
            self._tell_failure(WorkerFailed(status_of(error).code, error.message))
        except WorkerLost as lost:  # its `WorkerLife` tries again
            logger.warning("%s", lost)

    def _workers_in_table(self) -> list[WorkerAdapters]:
        lives = self._lives.values()
        return [life.adapters for life in lives if life.client is not None and life.adapters is not None]

    def _learned(self) -> None:
        """Publish the table, and let workers catch up, after names have changed."""
        self._service.changed()
        for life in self._lives.values():
            if life.adapters is not None:
                life.adapters.wake()

    def _all_heard(self) -> bool:
        """Return whether every worker has told its adapter names, and gateways have had the time to."""
        return time.monotonic() - self._began_at > GATEWAYS_S and all(
            life.adapters is not None for life in self._lives.values()
        )

    def _heard_enough(self) -> None:
        """Publish without the names of workers that have not answered yet; they are added when they come."""
        if self._catalogue.heard(*self._desired):
            self._service.changed()

    def _started(self) -> None:
        if self._gateways_started and all(life.has_served for life in self._lives.values()):
            self._failed, self._has_served = None, True
            self._settled.set()

    def _gateways_are_there(self, failure: str) -> None:
        """failure: why some gateways do not listen; empty if all do."""
        if failure and self._cannot_start(WorkerFailed(ERRORS[ConfigError].code, failure)):
            return
        self._gateways_started = True
        self._started()

    def _tell_failure(self, failure: WorkerFailed) -> None:
        """Report a failure once, however often it repeats."""
        if failure.message != self._last_failure:
            self._last_failure = failure.message
            self._events.add(failure.message, logging.ERROR)
        self._cannot_start(failure)

    def _cannot_start(self, failure: WorkerFailed) -> bool:
        """Note that the fleet cannot start. Return whether that is final, since it has never served."""
        if self._has_served:
            return False
        self._failed = failure
        self._settled.set()
        return True

    def _stopped(self, run: asyncio.Task[None]) -> None:
        """End this process when its main task has ended, so that Ray starts it again."""
        if run.cancelled():
            return
        error = run.exception()
        logger.critical("the controller ends", exc_info=error)
        self._events.add(f"the controller failed and is started again: {error!r}", logging.CRITICAL)
        is_new = self._cannot_start(WorkerFailed(ERRORS[InternalError].code, f"The controller failed: {error!r}"))
        asyncio.get_running_loop().call_later(FIRST_AGAIN_S if is_new else AGAIN_S, os._exit, 1)
