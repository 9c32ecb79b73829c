"""The controller's calls to one worker. Each has a deadline; one that fails raises `grpc.aio.AioRpcError`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from lorafleet.proto import worker_pb2, worker_pb2_grpc
from lorafleet.workers.rpc import CLIENT_OPTIONS, bearer, error_of

CALL_S = 5.0
LIST_S = 10.0
FILES_S = 30.0
REGISTER_S = 540.0  # an adapter may have to be downloaded; gateways wait 600 s


class WorkerClient:
    """A connection to a worker, as a context: it is closed at the end."""

    def __init__(self, address: str, token: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
        self._stub: Any = worker_pb2_grpc.WorkerStub(self._channel)
        self._metadata = bearer(token)

    async def __aenter__(self) -> WorkerClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def report(self) -> worker_pb2.WorkerReport:
        report: worker_pb2.WorkerReport = await self._call(self._stub.GetReport, worker_pb2.ReportRequest(), CALL_S)
        return report

    async def drain(self) -> int:
        """Have the worker refuse new requests. Return how many still run."""
        reply = await self._call(self._stub.Drain, worker_pb2.DrainRequest(), CALL_S)
        return int(reply.num_unfinished)

    async def adapters(self) -> worker_pb2.ListAdaptersReply:
        """Return the adapters registered there, and the versions that names stand for as far as it was told."""
        reply: worker_pb2.ListAdaptersReply = await self._call(
            self._stub.ListAdapters, worker_pb2.ListAdaptersRequest(), LIST_S
        )
        return reply

    async def note(self, adapters: Iterable[worker_pb2.Adapter]) -> None:
        """Tell the worker which versions names stand for."""
        await self._call(self._stub.NoteAdapters, worker_pb2.NoteAdaptersRequest(adapters=adapters), CALL_S)

    async def used(self, digests: Sequence[str], cut_s: float) -> set[str]:
        """Return those of `digests` that its requests need, or that requests cut within `cut_s` may need elsewhere."""
        request = worker_pb2.GetUseRequest(digests=digests, cut_s=cut_s)
        return set((await self._call(self._stub.GetUse, request, CALL_S)).digests)

    async def register(self, adapter: worker_pb2.Adapter) -> worker_pb2.Adapter:
        """Have `adapter` read from its place, or, if that is not known yet, its root. Return it as the worker found it.

        If it has a digest, other files are refused. Raises the worker's `AdapterRefusedError`.
        """
        request = worker_pb2.RegisterAdapterRequest(
            name=adapter.name,
            version=adapter.version,
            root=adapter.place or adapter.root,
            parent=adapter.parent,
            created=adapter.created,
            weight=adapter.weight if adapter.HasField("weight") else None,
            pin=adapter.pin,
            allowed_roots=adapter.allowed_roots,
            digest=adapter.digest,
            text_digest=adapter.text_digest,
        )
        reply = await self._call(self._stub.RegisterAdapter, request, REGISTER_S)
        if reply.HasField("failure"):
            raise error_of(reply.failure)
        registered: worker_pb2.Adapter = reply.adapter
        return registered

    async def unregister(self, name: str, version: int, timeout_s: float) -> worker_pb2.UnregisterAdapterReply:
        """Have a version forgotten, and wait until it is freed, for at most `timeout_s`."""
        request = worker_pb2.UnregisterAdapterRequest(name=name, version=version)
        reply: worker_pb2.UnregisterAdapterReply = await self._call(self._stub.UnregisterAdapter, request, timeout_s)
        return reply

    async def files(self, digest: str) -> dict[str, bytes]:
        """Return the tokenizer and template files with this digest, of an adapter registered there."""
        request = worker_pb2.GetFilesRequest(digest=digest)
        files: dict[str, bytearray] = {}
        with _lost_when_closed():
            async for chunk in self._stub.GetFiles(request, timeout=FILES_S, metadata=self._metadata):
                files.setdefault(chunk.name, bytearray()).extend(chunk.data)
        return {name: bytes(data) for name, data in files.items()}

    async def _call(self, method: Any, request: Any, timeout_s: float) -> Any:
        with _lost_when_closed():
            return await method(request, timeout=timeout_s, metadata=self._metadata)


@contextlib.contextmanager
def _lost_when_closed() -> Iterator[None]:
    """Fail a call whose connection is closed under it like a call to a lost worker.

    gRPC reports such a call, or the task that awaits it, as cancelled.
    """
    try:
        yield
    except (asyncio.CancelledError, grpc.aio.UsageError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "the connection was closed"
        ) from error
