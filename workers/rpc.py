"""Setup of our gRPC servers and channels: bearer token, one server per port, keepalive; errors as data."""

from __future__ import annotations

import contextlib
import hmac
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from lorafleet.proto import worker_pb2
from lorafleet.workers.errors import ConfigError, LoRAFleetError, error_from_code, status_of

MAX_MESSAGE_BYTES = 64 << 20  # a prompt of a million token ids is a few MB

_SERVER_OPTIONS = (
    # With port reuse, gRPC's default, a second server on the port would silently take half the connections.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Pings both ways detect a dead link in about 4 s; without the last two options, pinging clients are disconnected.
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
)
CLIENT_OPTIONS = (
    # Without this, $http_proxy would apply to calls within the fleet, even to 127.0.0.1.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


def create_server(token: str) -> grpc.aio.Server:
    """Return a server without services or ports that requires `token` on every call."""
    return grpc.aio.server(interceptors=[_BearerToken(token)], options=list(_SERVER_OPTIONS))


def add_port(server: grpc.aio.Server, host: str, ports: tuple[int, int] | None) -> int:
    """Listen on a free port of `ports` (last included), or on any. Raises `ConfigError` if none is free."""
    if ports is None:
        return int(server.add_insecure_port(f"{host}:0"))
    for port in range(ports[0], ports[1] + 1):
        with contextlib.suppress(OSError, RuntimeError):
            socket.create_server((host, port)).close()  # probed first: gRPC logs an error for a port in use
            return int(server.add_insecure_port(f"{host}:{port}"))
    raise ConfigError(f"No port of --worker-ports {ports[0]}-{ports[1]} is free on {host}. Give a wider range.")


def bearer(token: str) -> Sequence[tuple[str, str]]:
    """Return the metadata for a call to such a server."""
    return (("authorization", f"Bearer {token}"),)


def failure_of(error: LoRAFleetError) -> worker_pb2.Failure:
    """Return an error as data for a reply: a call's own status has no room for codes and reasons."""
    return worker_pb2.Failure(code=status_of(error).code, message=error.message, reason=getattr(error, "reason", ""))


def error_of(failure: worker_pb2.Failure) -> LoRAFleetError:
    """Return the error that `failure_of` turned into data."""
    return error_from_code(failure.code, failure.message, reason=failure.reason)


class _BearerToken(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

        async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "This call needs the fleet's bearer token.")

        self._refuse = {
            (False, False): grpc.unary_unary_rpc_method_handler(refuse),
            (False, True): grpc.unary_stream_rpc_method_handler(refuse),
            (True, False): grpc.stream_unary_rpc_method_handler(refuse),
            (True, True): grpc.stream_stream_rpc_method_handler(refuse),
        }

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(details)
        given = dict(details.invocation_metadata or ()).get("authorization", "")
        if handler is None or hmac.compare_digest(str(given).encode(), self._expected):
            return handler
        return self._refuse[handler.request_streaming, handler.response_streaming]
