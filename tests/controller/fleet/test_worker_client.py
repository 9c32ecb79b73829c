"""A call to a worker ends like a call, whatever happens to its connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from lorafleet.controller.fleet.worker_client import WorkerClient
from lorafleet.proto import worker_pb2, worker_pb2_grpc
from lorafleet.workers.rpc import create_server


class Silent(worker_pb2_grpc.WorkerServicer):
    """Accepts calls and answers none."""

    def __init__(self) -> None:
        self.called = asyncio.Event()

    async def GetUse(self, request: Any, context: Any) -> worker_pb2.GetUseReply:
        self.called.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def GetFiles(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.FileChunk]:
        self.called.set()
        await asyncio.Event().wait()
        yield worker_pb2.FileChunk()


CALLS: list[Callable[[WorkerClient], Awaitable[object]]] = [
    lambda client: client.used(["d"], 1.0),
    lambda client: client.files("d"),
]


@pytest.fixture
async def silent() -> AsyncIterator[tuple[Silent, str]]:
    server, worker = create_server("token"), Silent()
    cast(Any, worker_pb2_grpc.add_WorkerServicer_to_server)(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield worker, f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.mark.parametrize("call", CALLS)
async def test_a_connection_closed_during_a_call_is_a_lost_worker(
    call: Callable[[WorkerClient], Awaitable[object]], silent: tuple[Silent, str]
) -> None:
    """Not as a cancellation, which would end a caller of several workers with the first."""
    worker, address = silent
    async with asyncio.timeout(10.0):
        async with WorkerClient(address, "token") as client:
            calling = asyncio.ensure_future(call(client))
            await worker.called.wait()
        for failing in (calling, call(client)):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await failing
            assert failed.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_caller_that_is_cancelled_is_cancelled(silent: tuple[Silent, str]) -> None:
    worker, address = silent
    async with WorkerClient(address, "token") as client:
        calling = asyncio.ensure_future(client.used(["d"], 1.0))
        await worker.called.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
