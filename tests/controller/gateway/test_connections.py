"""Connections: heads that do not arrive, clients that do not read, too many of them, and data that is not HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import socket
from typing import Any

import pytest

from lorafleet.controller.gateway.connections import _network

BODY = {"model": "tiny", "prompt": "hello"}
REQUEST = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def port_of(fleet: Any) -> int:
    return int(fleet.url.rpartition(":")[2])


async def connect(fleet: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port_of(fleet))


def post(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


@pytest.mark.parametrize(
    "begun",
    [b"", b"G", b"GET /health HTTP/1.1\r\nHost: x\r\n", REQUEST + b"POST /v1/compl"],
    ids=["silence", "a letter", "half a head", "half of the second head"],
)
async def test_a_head_that_does_not_arrive_is_not_waited_for(new_fleet: Any, begun: bytes) -> None:
    fleet = await new_fleet(header_timeout_s=0.1)
    reader, writer = await connect(fleet)
    if begun.startswith(REQUEST):
        writer.write(REQUEST)
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200 ")
        begun = begun.removeprefix(REQUEST)
    writer.write(begun)
    answer = await asyncio.wait_for(reader.read(), 5)  # up to the connection's end
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"--header-timeout-s" in answer
    writer.close()


async def test_a_head_that_arrives_byte_by_byte_gets_no_longer(new_fleet: Any) -> None:
    fleet = await new_fleet(header_timeout_s=0.2)
    reader, writer = await connect(fleet)

    async def drip() -> None:
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    writer.write(b"GET /health HTTP/1.1\r\nx: ")
    with contextlib.suppress(ConnectionResetError):  # of a client that keeps writing
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 408 ")
    dripping.cancel()
    writer.close()


async def test_a_request_and_a_kept_connection_outlive_the_time_for_a_head(new_fleet: Any) -> None:
    fleet = await new_fleet(header_timeout_s=0.05)
    fleet.worker.permits = 0
    reader, writer = await connect(fleet)
    writer.write(post(BODY))
    await fleet.until(lambda: fleet.worker.running)
    await asyncio.sleep(0.1)  # longer than a head may take
    fleet.worker.permits = None
    assert (await asyncio.wait_for(reader.readuntil(b"}}}"), 5)).startswith(b"HTTP/1.1 200 ")
    await asyncio.sleep(0.1)
    writer.write(REQUEST)
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200 ")
    writer.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"SSH-2.0-x\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["TLS", "ssh", "a header without a colon", "no Host"],
)
async def test_data_that_is_not_http_gets_one_answer_and_no_traceback(
    fleet: Any, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    reader, writer = await connect(fleet)
    writer.write(garbage)
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.0 400 ")  # its version is unknown
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "invalid_request" and "HTTP/1.1" in error["message"] and len(error["message"]) < 400
    assert ("HTTPS" in error["message"]) is garbage.startswith(b"\x16") and ".." not in error["message"]
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.WARNING]
    writer.close()


async def test_connections_over_the_limit_are_refused_and_places_become_free_again(new_fleet: Any) -> None:
    fleet = await new_fleet(max_connections=8)  # one of them is reserved for other addresses
    open_ones = [await connect(fleet) for _ in range(7)]
    await fleet.until(lambda: fleet.listener.connections.shares.num_taken == 7)
    reader, writer = await connect(fleet)
    writer.write(REQUEST)
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1\r\n" in answer
    assert b"--max-connections" in answer
    writer.close()
    for _, other in open_ones:
        other.close()
    await fleet.until(lambda: fleet.listener.connections.shares.num_taken == 0)
    await fleet.until(lambda: fleet.listener.connections.num_lingering == 0)
    assert (await fleet.get("/health"))[0] == 200


async def test_another_address_finds_a_place_when_one_has_taken_all_it_could(new_fleet: Any) -> None:
    fleet = await new_fleet(max_connections=8)
    hog = [await connect(fleet) for _ in range(10)]
    await fleet.until(lambda: fleet.listener.connections.shares.num_taken == 7)
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(fleet), local_addr=("127.0.0.2", 0))
    writer.write(REQUEST)
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200 ")
    for _, other in [*hog, (reader, writer)]:
        other.close()


async def long_context(fleet: Any) -> None:
    """Make long answers possible."""
    fleet.controller.table.base.max_model_len = 1_000_000
    fleet.controller.publish()
    await fleet.until(lambda: fleet.state.table.max_model_len == 1_000_000)


def slow_reader(fleet: Any, request: bytes) -> socket.socket:
    """A client with a small buffer that does not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port_of(fleet)))
    client.sendall(request)
    return client


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_does_not_read_is_disconnected_and_its_request_is_over(
    new_fleet: Any, stream: bool
) -> None:
    fleet = await new_fleet(write_timeout_s=0.2, max_queued_tokens=100_000)
    await long_context(fleet)
    num_tokens = 100_000 if stream else 5_000
    with slow_reader(fleet, post(BODY | {"stream": stream, "max_tokens": num_tokens, "logprobs": 5})) as client:
        await fleet.until(lambda: fleet.worker.generates, 20)
        await fleet.until(lambda: fleet.state.intake.num_in_flight == 0, 40)
        await fleet.until(lambda: fleet.listener.connections.shares.held("127.0.0.1") == 0, 20)
        # At once, not only after the system has sent its buffer.
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
    await fleet.until(lambda: fleet.worker.cancels == ([1] if stream else []))


async def test_closing_a_connection_does_not_wait_forever_for_its_client(new_fleet: Any) -> None:
    """The rest to send is too little for its writer to wait; the answer is complete, but the client does not read."""
    fleet = await new_fleet(write_timeout_s=0.2)
    await long_context(fleet)
    body = BODY | {"max_tokens": 1000, "logprobs": 5}
    request = post(body).replace(b"Host: x", b"Host: x\r\nConnection: close")
    with slow_reader(fleet, request):
        await fleet.until(lambda: fleet.worker.generates, 20)
        await fleet.until(lambda: fleet.state.intake.num_in_flight == 0, 40)
        await fleet.until(lambda: fleet.listener.connections.shares.held("127.0.0.1") == 0, 20)


async def test_a_client_that_reads_slowly_but_reads_is_kept(new_fleet: Any) -> None:
    fleet = await new_fleet(write_timeout_s=0.1)
    await long_context(fleet)
    body = BODY | {"max_tokens": 400, "logprobs": 5, "n": 16}
    loop = asyncio.get_running_loop()
    received = b""
    with slow_reader(fleet, post(body)) as client:
        client.setblocking(False)
        while not received.endswith(b"}}}"):
            received += await loop.sock_recv(client, 2048)
            await asyncio.sleep(0.002)  # some 500 KB a second; the minimum is 1 KiB
    assert received.startswith(b"HTTP/1.1 200 ") and len(received) > 100_000


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("not:an:address", "not:an:address"),
    ],
)
def test_an_address_of_version_6_counts_with_its_network(address: str, network: str) -> None:
    assert _network(address) == network
