"""Rank 0's gRPC calls to the other ranks, and their answers: `Followers` over a network."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from lorafleet.proto import rank_pb2, rank_pb2_grpc
from lorafleet.workers.adapters.background import BackgroundThreads
from lorafleet.workers.errors import InternalError, LoRAFleetError
from lorafleet.workers.ranks.follower import Follower
from lorafleet.workers.rpc import CLIENT_OPTIONS, bearer, error_of, failure_of

logger = logging.getLogger(__name__)

_NUM_THREADS = 8  # per follower: one for each of rank 0's loader threads, and as many for registrations
_TIMEOUT_S = 600.0  # for a load from a slow file system; a rank that dies is noticed at once
_LIMIT_S = 590.0  # after which a follower abandons it


class RemoteFollowers:
    """Implements `Followers`."""

    are_none = False

    def __init__(self, addresses: Sequence[str], token: str, hidden_size: int, on_lost: Callable[[], None]) -> None:
        """addresses: host:port of each rank above 0. on_lost: called on some thread when one of them is lost."""
        self._hidden_size = hidden_size
        self._channels = [grpc.insecure_channel(address, options=list(CLIENT_OPTIONS)) for address in addresses]
        self._ranks = [rank_pb2_grpc.RankStub(channel) for channel in self._channels]
        self._metadata = bearer(token)
        self._on_lost = on_lost
        self._is_closed = False
        for rank in self._ranks:
            rank.Attend.future(rank_pb2.AttendRequest(), metadata=self._metadata).add_done_callback(self._attended)

    def register(self, path: Path, digest: str) -> None:
        self._ask("RegisterAdapter", rank_pb2.RankAdapter(digest=digest, path=str(path)))()

    def forget(self, digest: str) -> None:
        self._ask("ForgetAdapter", rank_pb2.RankAdapter(digest=digest))

    def prefetch(self, digest: str) -> None:
        self._ask("PrefetchAdapter", rank_pb2.RankAdapter(digest=digest))

    def partial_squares(self, path: Path, digest: str) -> list[torch.Tensor]:
        calls = self._call("SumSquares", rank_pb2.RankAdapter(digest=digest, path=str(path)))
        _raise_first(calls)
        return [_from_bytes(call.result().squares, self._hidden_size) for call in calls]

    def stage(
        self, path: Path, digest: str, slot: int, number: int, norms_NH: torch.Tensor | None
    ) -> Callable[[], None]:
        norms = b"" if norms_NH is None else _to_bytes(norms_NH)
        request = rank_pb2.StageRequest(digest=digest, path=str(path), slot=slot, number=number, norms=norms)
        return self._ask("StageAdapter", request)

    def close(self) -> None:
        self._is_closed = True
        for channel in self._channels:
            channel.close()

    def _attended(self, call: Any) -> None:
        if not self._is_closed:
            logger.error("a rank of this worker is lost: %s", call.exception())
            self._on_lost()

    def _ask(self, method: str, request: Any) -> Callable[[], None]:
        """Call all ranks at once; return a function that waits for all answers and raises the first error."""
        calls = self._call(method, request)
        return lambda: _raise_first(calls)

    def _call(self, method: str, request: Any) -> list[Any]:
        return [
            getattr(rank, method).future(request, timeout=_TIMEOUT_S, metadata=self._metadata) for rank in self._ranks
        ]


def _raise_first(calls: list[Any]) -> None:
    """Wait for all answers; raise the first error."""
    errors = [error for error in map(_error, calls) if error is not None]
    if errors:
        raise errors[0]


def _to_bytes(values: torch.Tensor) -> bytes:
    return values.float().numpy().astype("<f4").tobytes()


def _from_bytes(values: bytes, hidden_size: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(values, "<f4").astype(np.float32)).view(-1, hidden_size)


def _error(call: Any) -> LoRAFleetError | None:
    try:
        reply = call.result()
    except grpc.RpcError as error:
        return InternalError(f"A rank of this worker does not answer: {error}")
    return error_of(reply.failure) if reply.HasField("failure") else None


class RankService(rank_pb2_grpc.RankServicer):
    """A follower's gRPC service."""

    def __init__(self, follower: Follower, hidden_size: int) -> None:
        self._follower = follower
        self._hidden_size = hidden_size
        self._threads = BackgroundThreads(_NUM_THREADS, "lorafleet-rank")

    async def Attend(self, request: rank_pb2.AttendRequest, context: grpc.aio.ServicerContext) -> rank_pb2.RankReply:
        await asyncio.Event().wait()
        return rank_pb2.RankReply()

    async def RegisterAdapter(
        self, request: rank_pb2.RankAdapter, context: grpc.aio.ServicerContext
    ) -> rank_pb2.RankReply:
        return await self._reply(self._follower.register, Path(request.path), request.digest)

    async def ForgetAdapter(
        self, request: rank_pb2.RankAdapter, context: grpc.aio.ServicerContext
    ) -> rank_pb2.RankReply:
        return await self._reply(self._follower.forget, request.digest)

    async def PrefetchAdapter(
        self, request: rank_pb2.RankAdapter, context: grpc.aio.ServicerContext
    ) -> rank_pb2.RankReply:
        return await self._reply(self._follower.prefetch, request.digest)

    async def StageAdapter(
        self, request: rank_pb2.StageRequest, context: grpc.aio.ServicerContext
    ) -> rank_pb2.RankReply:
        norms_NH = _from_bytes(request.norms, self._hidden_size) if request.norms else None
        return await self._reply(
            self._follower.stage, Path(request.path), request.digest, request.slot, request.number, norms_NH
        )

    async def SumSquares(
        self, request: rank_pb2.RankAdapter, context: grpc.aio.ServicerContext
    ) -> rank_pb2.SquaresReply:
        squares: list[torch.Tensor] = []
        reply = await self._reply(
            lambda: squares.append(self._follower.partial_squares(Path(request.path), request.digest))
        )
        if reply.HasField("failure"):
            return rank_pb2.SquaresReply(failure=reply.failure)
        return rank_pb2.SquaresReply(squares=_to_bytes(squares[0]))

    async def _reply(self, method: Callable[..., None], *arguments: object) -> rank_pb2.RankReply:
        try:
            await asyncio.wrap_future(self._threads.submit(partial(method, *arguments), limit_s=_LIMIT_S))
        except LoRAFleetError as error:
            return rank_pb2.RankReply(failure=failure_of(error))
        except Exception:
            logger.exception("%s failed", method.__name__)
            failure = failure_of(InternalError("A rank of this worker failed; its log says why."))
            return rank_pb2.RankReply(failure=failure)
        return rank_pb2.RankReply()
