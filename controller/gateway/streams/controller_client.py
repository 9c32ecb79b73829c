"""The client of the controller: keeps its routing table and the model's tokenizer, and passes on clients' updates.

Owns: the Watch stream and its reconnects, fetching files by digest. Leaves to others: the use of a table (pool.py,
api/state.py).

The last table stays valid while the controller is unreachable; a controller that has lost its memory is sent it. A new
table's tokenizer replaces the old one once it is loaded; until then the old one serves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Final

import grpc.aio

from lorafleet.controller.gateway.routing.routing_table import RoutingTable
from lorafleet.controller.gateway.streams.controller_pulse import while_it_lives
from lorafleet.controller.gateway.streams.tokenizers import Tokenizers
from lorafleet.controller.gateway.streams.wire import Backoff, controller_stub, describe, open_channel
from lorafleet.proto import controller_pb2, worker_pb2
from lorafleet.workers.errors import DeadlineError, LoRAFleetError, ModelError, WorkerUnavailableError
from lorafleet.workers.rpc import bearer, error_of
from lorafleet.workers.text.model_text import ModelText

WATCH_DEADLINE_S: Final = 600.0  # after which the stream is opened again: the longest wait for a hung controller
FILES_DEADLINE_S: Final = 60.0
TABLE_S: Final = 10.0  # to receive a table that the controller has already sent
MAX_FILES_BYTES: Final = 512 << 20

logger = logging.getLogger(__name__)


class RoutesClient:
    """The client; `start` and `close` it. table and text: None until the first of each has arrived."""

    def __init__(
        self,
        address: str,
        *,
        token: str,
        gateway_id: str,
        executor: Executor,
        on_table: Callable[[RoutingTable], None],
    ) -> None:
        """executor: where tokenizers are built. on_table: called with each new table.

        text: the base model's. adapter_tokenizers: those of adapters that bring their own.
        """
        self.table: RoutingTable | None = None
        self.text: ModelText | None = None
        self.adapter_tokenizers = Tokenizers(self._fetch, executor, lambda: self.text)
        self._address = address
        self._metadata = bearer(token)
        self._gateway_id = gateway_id
        self._executor = executor
        self._on_table = on_table
        self._channel: Any = None
        self._arrived = asyncio.Event()  # set, and replaced, with each new table
        self._task: asyncio.Task[None] | None = None
        self._text_task: asyncio.Task[None] | None = None
        self._message = controller_pb2.RoutingTable()  # the last table, as received
        self._text_digest = ""  # of the tokenizer that is loaded or being loaded

    def start(self) -> None:
        """Begin to watch."""
        self._channel = open_channel(self._address)
        self._task = asyncio.create_task(self._run(), name="routes")

    async def close(self) -> None:
        """Stop watching and loading."""
        tasks = [task for task in (self._task, self._text_task) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.adapter_tokenizers.close()
        if self._channel is not None:
            await self._channel.close()

    async def update(self, method: str, request: Any, timeout_s: float) -> controller_pb2.AdapterUpdate:
        """Have the controller change its table, and wait until this gateway has the change.

        Raises the controller's refusal, `WorkerUnavailableError` if it is unreachable or silent, `DeadlineError`.
        """
        stub = controller_stub(self._channel)
        try:
            done: controller_pb2.AdapterUpdate = await while_it_lives(
                stub, self._metadata, getattr(stub, method)(request, metadata=self._metadata, timeout=timeout_s)
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineError(f"The controller did not answer within {timeout_s:g} s.") from error
            logger.warning("%s failed: %s", method, describe(error))
            raise WorkerUnavailableError("The controller cannot be reached now. Try again in a moment.") from error
        if done.HasField("failure"):
            raise error_of(done.failure)
        try:
            async with asyncio.timeout(TABLE_S):
                while not self._has(done):
                    await self._arrived.wait()
        except TimeoutError:
            raise DeadlineError("It is done, but this gateway has not received it yet. See GET /v1/models.") from None
        return done

    async def status(self, timeout_s: float) -> controller_pb2.FleetStatus:
        """Return the wanted workers' status. Raises `WorkerUnavailableError` if the controller does not answer."""
        call = controller_stub(self._channel).GetStatus
        try:
            status: controller_pb2.FleetStatus = await call(
                controller_pb2.StatusRequest(), metadata=self._metadata, timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise WorkerUnavailableError("The controller cannot be reached now. Try again in a moment.") from error
        return status

    def _has(self, done: controller_pb2.AdapterUpdate) -> bool:
        table = self.table  # another incarnation's table either has the change or has lost it for good
        return table is not None and (table.incarnation != done.incarnation or table.version >= done.version)

    async def _run(self) -> None:
        backoff = Backoff(0.1, 2.0)
        logged = ""  # the same reason is logged once
        while True:
            try:
                await self._watch(controller_stub(self._channel), backoff)
                reason = "it ended the stream"
            except grpc.aio.AioRpcError as error:
                expected = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and self.table is not None
                reason = "" if expected else describe(error)
            except Exception as error:  # a bug of ours must not leave the gateway with an old table for good
                logger.exception("the controller's table cannot be taken over")
                reason = type(error).__name__
            if reason and reason != logged:
                # Before the first table the controller is usually still starting.
                level = logging.INFO if self.table is None else logging.WARNING
                logger.log(level, "controller %s: %s; the last table stays valid", self._address, reason)
            logged = reason
            await asyncio.sleep(backoff.next_s())

    async def _watch(self, stub: Any, backoff: Backoff) -> None:
        request = controller_pb2.WatchRequest(
            gateway_id=self._gateway_id,
            fleet=self._message.fleet,
            adapters=[*self._message.adapters, *self._message.unloaded],
        )
        call = stub.Watch(request, metadata=self._metadata, timeout=WATCH_DEADLINE_S)
        try:
            async for message in call:
                table = await asyncio.to_thread(RoutingTable.from_wire, message)  # slow for thousands of adapters
                self._take(table, message)
                backoff.reset()
        finally:
            call.cancel()

    def _take(self, table: RoutingTable, message: controller_pb2.RoutingTable) -> None:
        old = self.table
        if old is not None and old.incarnation == table.incarnation and table.version < old.version:
            return
        self.table = table
        self._message = message
        if table.tokenizer_digest != self._text_digest:
            self._text_digest = table.tokenizer_digest
            if self._text_task is not None:
                self._text_task.cancel()
            self._text_task = asyncio.create_task(self._load_text(table.tokenizer_digest), name="tokenizer loader")
        self._on_table(table)
        self._arrived.set()
        self._arrived = asyncio.Event()

    async def _load_text(self, digest: str) -> None:
        """Load the base model's tokenizer; retry until that succeeds, or a table with another digest cancels it."""
        backoff = Backoff(0.2, 5.0)
        while True:
            try:
                files = await self._fetch(digest)
                text = await asyncio.get_running_loop().run_in_executor(
                    self._executor, ModelText.from_files, digest, files
                )
            except (grpc.aio.AioRpcError, LoRAFleetError) as error:
                logger.warning("tokenizer %s cannot be loaded: %s", digest[:16], describe(error))
            except Exception:  # a bug of ours, or no memory now
                logger.exception("tokenizer %s cannot be loaded", digest[:16])
            else:
                self.text = text
                logger.info("tokenizer %s loaded", digest[:16])
                return
            await asyncio.sleep(backoff.next_s())

    async def _fetch(self, digest: str) -> dict[str, bytes]:
        request = worker_pb2.GetFilesRequest(digest=digest)
        call = controller_stub(self._channel).GetFiles(request, metadata=self._metadata, timeout=FILES_DEADLINE_S)
        files: dict[str, bytearray] = {}
        num_bytes = 0
        async for chunk in call:
            num_bytes += len(chunk.data)
            if num_bytes > MAX_FILES_BYTES:
                call.cancel()
                raise ModelError(f"The tokenizer's files are over {MAX_FILES_BYTES} bytes.")
            files.setdefault(chunk.name, bytearray()).extend(chunk.data)
        return {name: bytes(data) for name, data in files.items()}
