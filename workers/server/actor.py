"""The worker as a Ray actor: engine, engine thread and gRPC server in one process. Thin: it only connects them.

Starts in its constructor, so that a worker which Ray restarts after a crash comes up by itself, with a new identity.
Imports the engine (and torch) only when it runs, so that the process which creates the actor stays light.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorafleet.proto import worker_pb2
from lorafleet.workers.address import own_address
from lorafleet.workers.config import EngineConfig, LoRAModule
from lorafleet.workers.errors import InternalError, LoRAFleetError, status_of
from lorafleet.workers.switch_interval import shorten_switch_interval

if TYPE_CHECKING:
    from lorafleet.workers.engine.loop import Engine
    from lorafleet.workers.server.adapter_registry import AdapterRegistry

logger = logging.getLogger(__name__)

_RAY_NICENESS = 15  # Ray's default for its workers


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady:
    """A worker that is ready to serve, and what it serves."""

    worker_id: str
    generation: int
    address: str  # host:port of its gRPC server
    adapters: tuple[worker_pb2.Adapter, ...]  # at start-up
    plan: tuple[str, ...]  # lines to print: the memory plan and the compute back end
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    max_loras: int
    num_ranks: int = 1


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """Settings that the fleet gives each of its processes."""

    controller_host: str  # processes listen on the address reachable from there
    token: str = field(repr=False)
    log_level: str = "warning"
    hung_step_s: float = 60.0  # a worker exits when a step gets older
    ports: tuple[int, int] | None = None  # of workers, last included; None: any


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """A worker that cannot start. Another try with the same configuration would fail too."""

    code: str  # of workers/errors.py
    message: str


def leave_ray_niceness() -> None:
    """Give the calling thread, and threads it starts later, normal priority instead of Ray's.

    At Ray's, a busy process leaves a worker a thirtieth of the core they share. `lorafleet serve` configures its own
    Ray; on an existing Ray, raising the priority needs a privilege, which root has.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) == _RAY_NICENESS:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)


class WorkerActor:
    """One worker's first process. All arguments are plain data, since Ray keeps them for restarts.

    With tensor parallelism it is rank 0: its start waits for the `FollowerActor`s, which get the address from `leads`.
    """

    def __init__(self, config: EngineConfig, adapters: Sequence[LoRAModule], fleet: FleetSettings) -> None:
        leave_ray_niceness()
        shorten_switch_interval()
        logging.basicConfig(level=fleet.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
        self._config = config
        self._adapters = adapters
        self._fleet = fleet
        self._host = own_address(fleet.controller_host)
        self._listener = socket.create_server((self._host, 0)) if config.tensor_parallel_size > 1 else None
        self._leads = "" if self._listener is None else f"{self._host}:{self._listener.getsockname()[1]}"
        # Ray constructs an actor with async methods on its event loop, so the start can be a task of that loop.
        self._started = asyncio.get_running_loop().create_task(self._start())

    async def ready(self) -> WorkerReady | WorkerFailed:
        """Wait until the worker serves or is known to be unable to."""
        return await asyncio.shield(self._started)

    async def leads(self) -> str:
        """Return host:port where the other ranks meet this one."""
        return self._leads

    async def _start(self) -> WorkerReady | WorkerFailed:
        try:
            engine, registry = await asyncio.to_thread(self._load)
            return await self._serve(engine, registry)
        except LoRAFleetError as error:
            return WorkerFailed(status_of(error).code, error.message)
        except Exception as error:
            logger.exception("the worker could not start")
            return WorkerFailed(status_of(InternalError("")).code, f"The worker could not start: {error!r}")

    def _load(self) -> tuple[Engine, AdapterRegistry]:
        """Plan the memory, check the adapters, read the weights, in this order: cheap checks fail first."""
        from lorafleet.workers.engine.loop import Engine
        from lorafleet.workers.server.adapter_registry import AdapterRegistry

        if self._listener is None:
            engine = Engine.from_config(self._config)
        else:
            from lorafleet.workers.ranks.start import Leader

            leader = Leader(self._config, self._listener, self._fleet.token, on_lost=lambda: os._exit(1))
            engine = Engine.from_config(self._config, leader.gather)
        registry = AdapterRegistry(engine, [module.name for module in self._adapters])
        for module in self._adapters:
            request = worker_pb2.RegisterAdapterRequest(
                name=module.name,
                version=1,
                root=module.path,
                parent=module.base_model_name or "",
                created=int(time.time()),
                weight=module.weight,
                pin=module.pin,
            )
            try:
                registry.note([registry.register(request).result()])
            except LoRAFleetError as error:
                error.message = f"Adapter {module.name!r}: {error.message}"
                raise
        engine.load()
        engine.use_tokenizers(registry.tokenizer)
        engine.prepare_grammars()
        # These objects stay. Without the freeze each full collection would scan them and stop the engine for 0.2 s.
        gc.collect()
        gc.freeze()
        return engine, registry

    async def _serve(self, engine: Engine, registry: AdapterRegistry) -> WorkerReady:
        from lorafleet.proto.worker_pb2_grpc import add_WorkerServicer_to_server
        from lorafleet.workers.rpc import add_port, create_server
        from lorafleet.workers.server.service import WorkerService

        worker_id, generation = uuid.uuid4().hex, time.time_ns()
        # os._exit: a crashed engine's threads must not keep the process from being replaced.
        self._service = WorkerService(
            engine,
            registry,
            worker_id=worker_id,
            generation=generation,
            on_crash=lambda: os._exit(1),
            hung_step_s=self._fleet.hung_step_s,
            on_hung=lambda: os._exit(1),
        )
        self._server = create_server(self._fleet.token)
        add_WorkerServicer_to_server(self._service, self._server)
        port = add_port(self._server, self._host, self._fleet.ports)
        await self._server.start()
        self._service.start()
        logger.info("worker %s serves %s on %s:%d", worker_id, self._config.model, self._host, port)
        return WorkerReady(
            worker_id=worker_id,
            generation=generation,
            address=f"{self._host}:{port}",
            adapters=tuple(registry.all()),
            plan=tuple(engine.describe()),
            max_model_len=engine.max_model_len,
            vocab_size=engine.vocab_size,
            max_num_seqs=self._config.max_num_seqs,
            max_loras=engine.memory.max_loras,
            num_ranks=self._config.tensor_parallel_size,
        )


class FollowerActor:
    """A worker's rank above 0; it lives as long as rank 0."""

    def __init__(self, config: EngineConfig, rank: int, leader: str, fleet: FleetSettings) -> None:
        """leader: the result of `WorkerActor.leads`."""
        leave_ray_niceness()
        logging.basicConfig(level=fleet.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
        self._run = asyncio.get_running_loop().create_task(self._follow(config, rank, leader, fleet.token))

    async def _follow(self, config: EngineConfig, rank: int, leader: str, token: str) -> None:
        from lorafleet.workers.ranks.start import follow

        try:
            await follow(config, rank, leader, own_address(leader.rpartition(":")[0]), token)
        except Exception:
            logger.exception("rank %d ends", rank)
        # Not by an exception: a thread may be in a collective that never returns. The worker is replaced as a whole.
        os._exit(1)
