"""The wait for a long call to the controller."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest

from lorafleet.controller.gateway.streams import controller_pulse as module
from lorafleet.controller.gateway.streams.controller_pulse import while_it_lives
from lorafleet.proto import controller_pb2
from lorafleet.workers.errors import WorkerUnavailableError


class FakeStub:
    """Answers pings as set; by default not in time."""

    def __init__(self, code: grpc.StatusCode | None = grpc.StatusCode.DEADLINE_EXCEEDED) -> None:
        self.code = code
        self.num_pings = 0
        self.pinged = asyncio.Event()

    async def Ping(self, request: Any, **options: Any) -> controller_pb2.PingReply:
        self.num_pings += 1
        if self.num_pings == 20:
            self.pinged.set()
        if self.code is not None:
            raise grpc.aio.AioRpcError(self.code, grpc.aio.Metadata(), grpc.aio.Metadata())
        return controller_pb2.PingReply()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PING_S", 0.001)
    monkeypatch.setattr(module, "SILENT_S", 0.05)


@pytest.mark.parametrize("code", [grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE])
async def test_a_silent_controller_is_not_waited_for(code: grpc.StatusCode) -> None:
    call: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(10):
        with pytest.raises(WorkerUnavailableError, match="The controller has not answered for"):
            await while_it_lives(FakeStub(code), (), call)
    assert call.cancelled()


@pytest.mark.parametrize("code", [None, grpc.StatusCode.UNIMPLEMENTED])
async def test_one_that_answers_is_waited_for_even_an_earlier_version(code: grpc.StatusCode | None) -> None:
    stub = FakeStub(code)
    call: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(while_it_lives(stub, (), call))
    async with asyncio.timeout(10):
        await stub.pinged.wait()
        assert not waiting.done()
        call.set_result("loaded")
        assert await waiting == "loaded"
    num_pings = stub.num_pings
    await asyncio.sleep(0.01)
    assert stub.num_pings == num_pings, "nobody waits now"


async def test_the_calls_error_reaches_the_caller() -> None:
    call: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    call.set_exception(KeyError("refused"))
    with pytest.raises(KeyError, match="refused"):
        await while_it_lives(FakeStub(None), (), call)


async def test_a_cancelled_caller_ends_the_call() -> None:
    call: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(while_it_lives(FakeStub(None), (), call))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert call.cancelled()
