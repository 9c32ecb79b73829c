"""Connections are accepted a few at a time, and go on being accepted when descriptors have run out."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from lorafleet.controller.gateway import acceptor as acceptor_module
from lorafleet.controller.gateway.acceptor import MAX_AT_ONCE, Acceptor


class Counted(asyncio.Protocol):
    made: list[Counted]
    transport: asyncio.BaseTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.made.append(self)

    def data_received(self, data: bytes) -> None:
        assert isinstance(self.transport, asyncio.Transport)
        self.transport.write(data)


@pytest.fixture
async def made() -> AsyncIterator[list[Counted]]:
    Counted.made = []
    yield Counted.made
    for protocol in Counted.made:
        protocol.transport.close()
    await asyncio.sleep(0)


async def test_a_connection_is_served_and_outlives_the_acceptor(made: list[Counted]) -> None:
    acceptor = Acceptor(Counted)
    port = await acceptor.listen("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    acceptor.close()
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_burst_is_accepted_over_several_turns_of_the_loop(made: list[Counted]) -> None:
    acceptor = Acceptor(Counted)
    port = await acceptor.listen("127.0.0.1", 0)
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(5 * MAX_AT_ONCE)]
    steps = []
    while len(made) < len(clients):
        before = len(made)
        await asyncio.sleep(0)
        steps.append(len(made) - before)
    assert max(steps) <= MAX_AT_ONCE
    acceptor.close()
    for client in clients:
        client.close()


async def test_a_taken_port_is_refused(made: list[Counted]) -> None:
    first, second = Acceptor(Counted), Acceptor(Counted)
    port = await first.listen("127.0.0.1", 0)
    with pytest.raises(OSError) as refused:
        await second.listen("127.0.0.1", port)
    assert refused.value.errno == errno.EADDRINUSE
    first.close()


@pytest.mark.parametrize("host", ["x" * 300, "a..b", "\udcff"])
async def test_a_host_that_is_no_name_is_refused(host: str) -> None:
    with pytest.raises(OSError, match="no name"):
        await Acceptor(Counted).listen(host, 0)


async def test_two_share_a_port_that_both_ask_to_share(made: list[Counted]) -> None:
    first, second = Acceptor(Counted), Acceptor(Counted)
    port = await first.listen("127.0.0.1", 0, reuse_port=True)
    assert await second.listen("127.0.0.1", port, reuse_port=True) == port
    first.close()
    second.close()


async def test_without_descriptors_connections_wait_and_are_accepted_later(
    made: list[Counted],
    eventually: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(acceptor_module, "_RETRY_S", 0.05)
    acceptor = Acceptor(Counted)
    port = await acceptor.listen("127.0.0.1", 0)
    accept = socket.socket.accept
    failures = iter([OSError(errno.EMFILE, "Too many open files")])

    def failing(self: socket.socket) -> tuple[socket.socket, object]:
        if (error := next(failures, None)) is not None:
            raise error
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", failing)
    client = socket.create_connection(("127.0.0.1", port))
    await eventually(lambda: made)
    assert "connections wait: Too many open files" in caplog.text
    acceptor.close()
    client.close()
