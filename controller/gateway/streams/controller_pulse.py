"""Waits for a long call to the controller while the controller lives.

A load may take minutes, and a hung controller keeps its connection. So it is pinged, and must answer at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Final, TypeVar

import grpc.aio

from lorafleet.proto import controller_pb2
from lorafleet.workers.errors import WorkerUnavailableError

_T = TypeVar("_T")

PING_S: Final = 1.0  # between two pings, and for an answer
SILENT_S: Final = 5.0


async def while_it_lives(stub: Any, metadata: Sequence[tuple[str, str]], call: Awaitable[_T]) -> _T:
    """Return the result of `call`. Raises `WorkerUnavailableError` once the controller has been silent for too long."""
    waiting = asyncio.ensure_future(call)
    silence = asyncio.ensure_future(_silence(stub, metadata))
    try:
        await asyncio.wait([waiting, silence], return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
    finally:
        for task in (waiting, silence):
            task.cancel()
        await asyncio.gather(waiting, silence, return_exceptions=True)
    raise WorkerUnavailableError(
        f"The controller has not answered for {SILENT_S:g} s. GET /v1/models shows whether the update succeeded; "
        "try again in a moment."
    )


async def _silence(stub: Any, metadata: Sequence[tuple[str, str]]) -> None:
    """Wait until the controller has not answered for `SILENT_S`."""
    loop = asyncio.get_running_loop()
    answered_at = loop.time()
    while loop.time() - answered_at < SILENT_S:
        try:
            await stub.Ping(controller_pb2.PingRequest(), metadata=metadata, timeout=PING_S)
            answered_at = loop.time()
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:  # an earlier version without Ping
                answered_at = loop.time()
        await asyncio.sleep(PING_S)
