"""The gateway's gRPC channels, and its waits between attempts.

Owns: channel options and back-off. Leaves to others: the calls (controller_client.py, session.py) and their deadlines.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

import grpc.aio

from lorafleet.proto import controller_pb2_grpc, worker_pb2_grpc
from lorafleet.workers.rpc import CLIENT_OPTIONS

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    *CLIENT_OPTIONS,
    # Each channel has its own connection, so a new one does not inherit an old one's wait before reconnecting.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


def open_channel(address: str) -> Any:  # grpc ships no types
    """Open a channel to another part of the fleet; close it when done."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def controller_stub(channel: Any) -> Any:
    """Return the controller's calls."""
    kind: Any = controller_pb2_grpc.ControllerStub  # generated code has no types
    return kind(channel)


def worker_stub(channel: Any) -> Any:
    """Return a worker's calls."""
    kind: Any = worker_pb2_grpc.WorkerStub
    return kind(channel)


def describe(error: BaseException) -> str:
    """Return a failed call in one line."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__


class Backoff:
    """Growing waits between attempts, jittered so that gateways do not reconnect in step."""

    def __init__(self, first_s: float, last_s: float, uniform: Callable[[float, float], float] = random.uniform):
        self._first_s = first_s
        self._last_s = last_s
        self._uniform = uniform
        self._next_s = first_s

    def reset(self) -> None:
        """Begin with the first wait again, after a success."""
        self._next_s = self._first_s

    def next_s(self) -> float:
        """Return how long to wait now."""
        wait_s = self._next_s
        self._next_s = min(wait_s * 2, self._last_s)
        return self._uniform(wait_s / 2, wait_s)
