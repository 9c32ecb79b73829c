"""The controller's gRPC face: the routing table to whoever watches, tokenizer files by digest, adapter updates.

The base model's files are kept here; an adapter's come from a worker, which can read its directory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import grpc
import grpc.aio

from lorafleet.controller.adapters import AdapterUpdates
from lorafleet.controller.catalogue import Catalogue
from lorafleet.controller.worker_client import WorkerClient
from lorafleet.proto import controller_pb2, controller_pb2_grpc, worker_pb2
from lorafleet.workers.errors import LoRAFleetError, ModelError
from lorafleet.workers.rpc import failure_of
from lorafleet.workers.text.files import chunks, files_digest, read_text_files


def read_tokenizer_files(model_dir: Path) -> dict[str, bytes]:
    """The files that a tokenizer is made of. Raises `ModelError`."""
    files = read_text_files(model_dir)
    if "tokenizer.json" not in files:
        raise ModelError(f"{model_dir} has no tokenizer.json; only fast tokenizers are served.")
    return files


class ControllerService(controller_pb2_grpc.ControllerServicer):
    """Publishes one catalogue. Call `changed` after each change of it."""

    def __init__(
        self,
        catalogue: Catalogue,
        files: Mapping[str, Mapping[str, bytes]],
        updates: AdapterUpdates,
        *,
        workers: Callable[[], Sequence[controller_pb2.WorkerStatus]],
        clients: Callable[[], Sequence[WorkerClient]] = tuple,
        learned: Callable[[], None] = lambda: None,
    ) -> None:
        """files: by digest, then by name. workers: how the wanted ones are. clients: of those in the table. learned:
        called when a gateway has told what names stand for."""
        self._workers = workers
        self._clients = clients
        self._learned = learned
        self._catalogue = catalogue
        self._updates = updates
        self._files = files
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Wake every watcher."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def Watch(
        self, request: controller_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[controller_pb2.RoutingTable]:
        if request.fleet and request.fleet == self._catalogue.fleet and self._catalogue.note(request.adapters):
            self.changed()
            self._learned()
        while True:
            changed = self._changed
            if self._catalogue.is_complete:
                yield self._catalogue.table()
            await changed.wait()

    async def LoadAdapter(
        self, request: controller_pb2.LoadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.AdapterUpdate:
        try:
            await self._updates.load(
                request.name,
                request.root,
                load_inplace=request.load_inplace,
                weight=request.weight if request.HasField("weight") else 1.0,
                pin=request.pin,
            )
        except LoRAFleetError as error:
            return controller_pb2.AdapterUpdate(failure=failure_of(error))
        return self._update()

    async def UnloadAdapter(
        self, request: controller_pb2.UnloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.AdapterUpdate:
        try:
            freed = await self._updates.unload(request.name)
        except LoRAFleetError as error:
            return controller_pb2.AdapterUpdate(failure=failure_of(error))
        update = self._update()
        update.device_bytes, update.host_bytes = freed.device_bytes, freed.host_bytes
        update.num_draining = freed.num_draining
        return update

    async def GetStatus(
        self, request: controller_pb2.StatusRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.FleetStatus:
        return controller_pb2.FleetStatus(
            incarnation=self._catalogue.incarnation,
            version=self._catalogue.version,
            num_adapters=len(self._catalogue.adapters()),
            workers=self._workers(),
        )

    async def Ping(
        self, request: controller_pb2.PingRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.PingReply:
        return controller_pb2.PingReply()

    def _update(self) -> controller_pb2.AdapterUpdate:
        return controller_pb2.AdapterUpdate(incarnation=self._catalogue.incarnation, version=self._catalogue.version)

    async def GetFiles(
        self, request: worker_pb2.GetFilesRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.FileChunk]:
        files = self._files.get(request.digest)
        if files is None:
            files = await self._files_of_workers(request.digest)
        if files is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"No files with digest {request.digest} are known here.")
            return
        for name, data in chunks(files):
            yield worker_pb2.FileChunk(name=name, data=data)

    async def _files_of_workers(self, digest: str) -> dict[str, bytes] | None:
        """None: no worker has them."""
        for client in self._clients():
            try:
                files = await client.files(digest)
            except grpc.aio.AioRpcError:
                continue
            if files_digest(files) == digest:
                return files
        return None
